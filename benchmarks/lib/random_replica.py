"""A replica with random weights, and traffic for it: what a ranking service computes, without a run or a server.

Titles are random words, each of them a token. Prompts are the shipped ones of stage 2, with a slot for the user and one
for the target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.lib.machine import ROOT
from benchmarks.lib.random_backbone import SHAPES, build_random_model
from collm_dist.assets import BackboneSource
from collm_dist.data.prompts.item_tokens import load_item_tokens
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.prompt_template import PromptTemplate
from collm_dist.data.prompts.ragged import to_offsets
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from collm_dist.llm.backbone import Backbone
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.packed.decoder import PackedDecoder, find_decoder
from collm_dist.llm.packed.kept_contexts import KeptContexts
from collm_dist.llm.slot_mapping import SlotMapper
from collm_dist.serving.block_scorer import BlockScorer, Scores
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.scoring import AUTO_TOKENS

NUM_ITEMS, NUM_WORDS, TITLE_WORDS = 2000, 1000, 6
# Title, quotes and the comma after it.
TOKENS_PER_TITLE = TITLE_WORDS + 3
CF_DIM = 64
# Users among whom a returning user is found.
RECENT_USERS = 100


@dataclass(frozen=True)
class Request:
    """A user with a history, and candidates."""

    user: int
    history: tuple[int, ...]
    candidates: NDArray[np.int64]


class RandomVectors:
    """Collaborative vectors of random tables."""

    embedding_dim = CF_DIM

    def __init__(self, device: torch.device) -> None:
        """Draw the tables."""
        generator = torch.Generator().manual_seed(1)
        self._items, self._users = (torch.randn(NUM_ITEMS, CF_DIM, generator=generator).to(device) for _ in range(2))

    def user_vectors(self, user_idx: Tensor, history: Tensor, target: Tensor, timestamp: Tensor) -> Tensor:
        """See ``CollaborativeVectors``."""
        return self._users[user_idx % NUM_ITEMS]

    def item_vectors(self, item_idx: Tensor, timestamp: Tensor) -> Tensor:
        """See ``CollaborativeVectors``."""
        return self._items[item_idx]


class RandomReplica:
    """A model with random weights that scores requests as the service's replicas do.

    Attributes:
        device: of the model.
        history_length: titles in a full prompt.
        prompt_tokens: tokens of a full prompt of one target.
        context_tokens: tokens of its context, without the header that all prompts share.
    """

    def __init__(self, shape: str, prompt_tokens: int) -> None:
        """Build the model.

        Args:
            shape: of the backbone.
            prompt_tokens: of a full prompt; as many titles as fit.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        tokenizer, random = _build_tokenizer(), np.random.default_rng(0)
        words = random.integers(0, NUM_WORDS, (NUM_ITEMS, TITLE_WORDS))
        titles = [" ".join(f"w{word}" for word in title) for title in words.tolist()]
        backbone = build_random_model(shape, dtype, len(tokenizer)).eval().requires_grad_(False)
        mapper = SlotMapper(
            cf_dim=CF_DIM, pair_dim=None, llm_dim=SHAPES[shape].width, hidden_multiple=10, tokens_per_slot=1,
            out_scale=0.02, seed=0,
        )  # fmt: skip
        model = CollmModel(
            backbone, (1, 2), "yes_minus_no", mapper, RandomVectors(self.device),
            decoder=PackedDecoder(find_decoder(backbone)),
        ).to(self.device).eval().requires_grad_(False)  # fmt: skip
        text = (ROOT / "configs" / "prompts" / "stage2.txt").read_text(encoding="utf-8")
        collators = []
        with tempfile.TemporaryDirectory() as folder:
            tokens = load_item_tokens(Path(folder), titles, tokenizer, max_tokens=TITLE_WORDS)
            for length in (1, None):
                if length is None:  # the rest of the prompt is known
                    fixed = self._count(collators[0], 1)[0] - TOKENS_PER_TITLE
                    length = max(1, (prompt_tokens - fixed) // TOKENS_PER_TITLE)
                collators.append(
                    PromptCollator(
                        PromptTemplate.parse(text, allow_slots=True, user_depends_on_target=False), tokens, tokenizer,
                        history_length=length, cf_history_length=1, max_prompt_tokens=100_000,
                        empty_history_text="none", tokens_per_slot=1, user_depends_on_target=False,
                    )
                )  # fmt: skip
            self.history_length = length
        self.prompt_tokens, self.context_tokens = self._count(collators[1], self.history_length)
        source = Backbone(backbone, tokenizer, BackboneSource(shape, None, shape, ""))
        loaded = LoadedStage(model, collators[1], source, None, self.device)
        max_tokens = AUTO_TOKENS[self.device.type]
        self._model = model
        self._scorer = BlockScorer("stage2", loaded, None, [str(item) for item in range(NUM_ITEMS)], max_tokens)

    @staticmethod
    def _count(collator: PromptCollator, history_length: int) -> tuple[int, int]:
        """Return the tokens of a whole prompt, and of its context without the header."""
        request = Request(0, tuple(range(history_length)), np.zeros(1, np.int64))
        counts = collator.for_scoring().count_tokens(build_block([request]))
        return counts.header + int((counts.prefix + counts.tail + counts.branch).sum()), int(counts.prefix.sum())

    def score(self, requests: Sequence[Request], kept: KeptContexts | None = None) -> Scores:
        """Return the scores of the requests' candidates, one request after the other, in one pass."""
        self._model.kept_contexts = kept
        return self._scorer.score(build_block(requests))


class Traffic:
    """Requests of new users and of users who return, half of them with another event in the history."""

    def __init__(self, returning: float, history_length: int, candidates: int, seed: int) -> None:
        """Start without users.

        Args:
            returning: share of requests by users who have asked before.
            history_length: titles in a full prompt; a new user has between one and so many.
            candidates: of a request.
            seed: of all draws.
        """
        self._returning, self._history_length, self._candidates = returning, history_length, candidates
        self._random = np.random.default_rng(seed)
        self._histories: list[tuple[int, ...]] = []

    def draw(self) -> Request:
        """Return the next request."""
        random = self._random
        if self._histories and random.random() < self._returning:
            first = max(0, len(self._histories) - RECENT_USERS)
            user = int(random.integers(first, len(self._histories)))
            if random.random() < 0.5:
                self._histories[user] += (int(random.integers(NUM_ITEMS)),)
        else:
            user, length = len(self._histories), int(random.integers(1, self._history_length + 1))
            self._histories.append(tuple(random.integers(0, NUM_ITEMS, length).tolist()))
        return Request(user, self._histories[user], random.choice(NUM_ITEMS, self._candidates, replace=False))


def build_block(requests: Sequence[Request]) -> ContextBlock:
    """Return requests in the form of the shards; statistics are 0."""
    sizes = np.array([len(request.candidates) for request in requests])
    histories = [request.history for request in requests]
    targets = {name: np.zeros(sizes.sum(), np.int64) for name in TARGET_FIELDS}
    targets |= {"item_idx": np.concatenate([request.candidates for request in requests])}
    targets |= {name: np.arange(sizes.sum()) for name in ("row_id", "group_id")}
    return ContextBlock(
        user_idx=np.array([request.user for request in requests]),
        num_likes=np.array([len(history) for history in histories]),
        history_offsets=to_offsets(np.array([len(history) for history in histories])),
        history_items=np.array([item for history in histories for item in history], np.int64),
        target_offsets=to_offsets(sizes),
        dislike_offsets=np.zeros(sizes.sum() + 1, np.int64),
        dislike_items=np.zeros(0, np.int64),
        **targets,
    )


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words; those of the prompts are one unknown word."""
    vocabulary = {name: number for number, name in enumerate(["<unk>", "Yes", "No"])}
    vocabulary |= {f"w{word}": len(vocabulary) + word for word in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106
