"""Small data for loader tests: a real tokenizer trained in this process, shards in a folder."""

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.manifest import Manifest, SplitInfo
from collm_dist.data.shards.shard_writer import write_shard

TEXTS = [
    "Here is what a person has liked so far, from the oldest to the latest",
    "Would this person like the movie as well? Reply with Yes or No. Answer:",
    '"Toy Story (1995)", "Heat", "Jumanji"',
]


@cache
def make_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with about 300 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_contexts(
    targets_per_context: list[int], num_items: int = 20, seed: int = 0, max_history: int = 6, first_row: int = 0
) -> ContextBlock:
    """Return contexts of users 0, 1, ... with distinct row ids and items below ``num_items``."""
    rng = np.random.default_rng(seed)
    num_contexts, num_targets = len(targets_per_context), sum(targets_per_context)
    history = rng.integers(0, max_history + 1, num_contexts)
    dislikes = rng.integers(0, 3, num_targets)
    counts = {name: rng.integers(0, 9, num_targets) for name in ("user_likes", "item_likes")}
    row_id = first_row + np.arange(num_targets)
    since = np.random.default_rng(seed)
    return ContextBlock(
        user_idx=np.arange(num_contexts) // 2,
        num_likes=np.arange(num_contexts) % 2 * 3,
        history_offsets=np.concatenate([[0], np.cumsum(history)]),
        history_items=rng.integers(0, num_items, history.sum()),
        target_offsets=np.concatenate([[0], np.cumsum(targets_per_context)]).astype(np.int64),
        dislike_offsets=np.concatenate([[0], np.cumsum(dislikes)]),
        dislike_items=rng.integers(0, num_items, dislikes.sum()),
        likes_since=np.concatenate([np.zeros(0, int), *(-np.sort(-since.integers(0, 5, count)) for count in dislikes)]),
        item_idx=rng.integers(0, num_items, num_targets),
        label=rng.integers(0, 2, num_targets),
        timestamp=np.arange(num_targets),
        row_id=row_id,
        group_id=row_id,
        sampled=np.zeros(num_targets, dtype=np.int64),
        user_rows=counts["user_likes"] + 1,
        item_rows=counts["item_likes"] + 1,
        user_in_train=np.ones(num_targets, dtype=np.int64),
        item_in_train=np.ones(num_targets, dtype=np.int64),
        **counts,
    )


def write_split(data_dir: Path, block: ContextBlock, num_shards: int, split: str = "train") -> Manifest:
    """Write a block's contexts to shards and return their manifest."""
    owners = (block.user_idx * 7 + block.num_likes) % num_shards
    shards = [
        write_shard(
            data_dir,
            f"{split}-{shard:05d}.tar",
            split,
            block.take_contexts(np.flatnonzero(owners == shard)),
            contexts_per_record=5,
        )
        for shard in range(num_shards)
        if np.any(owners == shard)
    ]
    info = SplitInfo(block.num_targets, block.num_contexts, block.num_targets, 0, 1)
    return Manifest(
        num_users=int(block.user_idx.max()) + 1,
        num_items=20,
        users_hash="u",
        items_hash="i",
        ties="strict",
        feedback="explicit",
        max_history_length=50,
        splits={split: info},
        shards=tuple(shards),
        buckets=(),
        dropped={},
        content_hash="c",
    )
