"""From blocks of indices to the tensors that the model reads: prompts are laid out here, and nowhere else.

While a prompt is laid out, slots are negative codes among the token ids; they end as places, so nothing that a title
contains can be taken for one.

Shapes: C contexts, N targets, H history items.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from collm_dist.config import Config
from collm_dist.data.prompts.item_tokens import ItemTokens, load_item_tokens
from collm_dist.data.prompts.prompt_template import PromptTemplate, Segment, load_prompt_text
from collm_dist.data.prompts.ragged import Ragged, hash_rows, join_columns, repeat_values, take_distinct, to_offsets
from collm_dist.data.prompts.slot_codes import CONTINUED, HISTORY, SLOT_CODES, Masking, PromptTokens, find_slots
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.shards.context_block import ContextBlock, IntArray
from collm_dist.data.shards.interactions import load_item_table
from collm_dist.errors import ConfigError
from collm_dist.prompt_batch import TAIL, Mirrored, PromptBatch, Segments
from collm_dist.random_keys import hash_integers
from collm_dist.runs.run_dir import RunDir


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a block: (C,) constant prefixes, (C,) context tails, (N,) branches, and the header before them all."""

    prefix: IntArray
    tail: IntArray
    branch: IntArray
    header: int = 0


class PromptCollator:
    """Lays out the prompts of one stage.

    Attributes:
        template: the prompt.
        tokens_per_slot: columns of a slot.
        num_cut_titles: item texts cut at ``prompt.max_title_tokens``.
        num_dropped_history: history items left out so far because a prompt was too long.
    """

    def __init__(
        self,
        template: PromptTemplate,
        item_tokens: ItemTokens,
        tokenizer: Any,
        *,
        history_length: int,
        cf_history_length: int,
        max_prompt_tokens: int,
        empty_history_text: str,
        tokens_per_slot: int,
        user_depends_on_target: bool,
        time_cuts: Sequence[int] = (),
    ) -> None:
        """Tokenize the template.

        Args:
            template: parsed prompt.
            item_tokens: of every item.
            tokenizer: of the backbone.
            history_length: items shown at most.
            cf_history_length: items that the user vector may read.
            max_prompt_tokens: the oldest items are dropped to fit.
            empty_history_text: stands for an empty history.
            tokens_per_slot: columns of a slot.
            user_depends_on_target: whether each target has a user vector of its own.
            time_cuts: timestamps (seconds) at which the vectors behind the slots change; see ``cut_contexts``.

        Raises:
            ConfigError: the prompt does not fit ``max_prompt_tokens`` even without a history.
        """
        self.template = template
        self.num_dropped_history = 0
        self.num_cut_titles = item_tokens.num_cut
        self._titles = Ragged(np.asarray(item_tokens.offsets), np.asarray(item_tokens.ids))
        self._history_length, self._cf_history_length = history_length, cf_history_length
        self.tokens_per_slot = tokens_per_slot
        self._user_depends_on_target = user_depends_on_target
        self._time_cuts = np.asarray(time_cuts, dtype=np.int64)

        def tokenize(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._separator = tokenize(", ")
        self._empty = tokenize(empty_history_text) if template.has("<ItemTitleList>") else []
        self._texts = {one.text: tokenize(one.text) for one in template.segments if not one.is_field}
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._bos: list[int] = [bos] if begins else []
        self._header = self._find_header()
        self._filler_id = bos if bos is not None else 0
        self._budget = max_prompt_tokens - self._count_fixed_tokens()
        if self._budget < len(self._empty):
            raise ConfigError(
                f"prompt.max_prompt_tokens={max_prompt_tokens}: the prompt needs "
                f"{max_prompt_tokens - self._budget + len(self._empty)} tokens before any history is shown; raise "
                "it, or lower prompt.max_title_tokens"
            )

    def _find_header(self) -> list[int]:
        """Return the tokens that all prompts begin with, if what follows them in their region differs."""
        region = self.template.prefix or self.template.tail
        if not any(segment.is_field for segment in region):
            return []
        texts = itertools.takewhile(lambda segment: not segment.is_field, region)
        return self._bos + [token for segment in texts for token in self._texts[segment.text]]

    def _count_fixed_tokens(self) -> int:
        """Tokens that every prompt has, with the longest target title: what a prompt shows is then no matter of which
        targets share its context."""
        total = len(self._bos)
        for segment in self.template.segments:
            if segment.text == "<TargetItemTitle>":
                total += int(self._titles.lengths.max(initial=0))
            elif segment.is_slot and segment.text != "<ItemIDList>":
                total += self.tokens_per_slot
            elif not segment.is_field:
                total += len(self._texts[segment.text])
        return total

    def for_scoring(self, *, slots: bool = True) -> PromptCollator:
        """Return a collator for passes that train nothing: all of a context is constant then.

        Args:
            slots: whether a prefix may hold slots. Where it outlives a pass, or slots are filled anew, it may not, and
                a context with slots stays divided.
        """
        if not slots and any(segment.is_slot for segment in self.template.tail):
            return self
        scoring = copy.copy(self)
        context = self.template.prefix + self.template.tail
        scoring.template = dataclasses.replace(self.template, prefix=context, tail=())
        scoring._header = scoring._find_header()
        return scoring

    def cut_contexts(self, block: ContextBlock) -> ContextBlock:
        """Return the block with contexts cut where a target is on the other side of a time cut than the one before.

        Targets of one context then are described as of one time, however a batch is divided later.
        """
        if len(self._time_cuts) == 0:
            return block
        return block.cut_where_changed(np.searchsorted(self._time_cuts, block.timestamp, side="right"))

    def count_tokens(self, block: ContextBlock) -> TokenCounts:
        """Return how many tokens the block's prompts have."""
        prefix, tail, branch = self._lay_out(block, self._show_history(block)[0])
        return TokenCounts(prefix.lengths, tail.lengths, branch.lengths, len(self._header))

    def collate(self, block: ContextBlock | None, example: ContextBlock, masking: Masking | None = None) -> PromptBatch:
        """Lay out a micro-batch.

        Args:
            block: contexts and targets; None = a filler that weighs nothing.
            example: any non-empty block of the same batch, from which a filler is made.
            masking: in training only.
        """
        weight = 0.0 if block is None else 1.0
        if block is None:
            block = example.take_targets(np.arange(1))
        shown, dropped = self._show_history(block)
        self.num_dropped_history += dropped
        prefix, tail, branch = self._lay_out(block, shown)
        branches = branch.merge(block.target_offsets)
        tree = join_columns([tail, branches], block.num_contexts)

        # Where each branch token stands in the tree: after its row's tail.
        owner = block.target_contexts
        rows = owner[branch.rows]
        places = tree.offsets[rows] + tail.lengths[rows] + np.arange(len(branch.values)) - branches.offsets[rows]
        targets = np.full(len(tree.values), TAIL)
        targets[places] = branch.rows
        start = len(self._header) + prefix.lengths
        positions = start[tree.rows] + tree.columns
        positions[places] = (start + tail.lengths)[rows] + branch.columns

        contexts = hash_integers(0, block.user_idx, block.num_likes).view(np.int64)
        prefix, prefix_keys, prefix_rows = take_distinct(prefix, self._describe_slots(block))
        firsts = np.unique(prefix_rows, return_index=True)[1]
        laid = PromptTokens(
            np.concatenate([prefix.values, tree.values]),
            np.concatenate([firsts[prefix.rows], tree.rows]),
            np.concatenate([np.full(len(prefix.values), TAIL), targets]),
        )
        slots = find_slots(block, laid, shown, contexts, masking, user_depends_on_target=self._user_depends_on_target)
        arrays: dict[str, Any] = {
            "header_ids": np.array(self._header, dtype=np.int64),
            "prefix_ids": np.where(prefix.values < 0, self._filler_id, prefix.values),
            "context_keys": contexts,
            "tree_ids": np.where(tree.values < 0, self._filler_id, tree.values),
            "tree_targets": targets,
            "tree_positions": positions,
            "last": places[branch.offsets[1:] - 1],
            "pair_features": compute_pair_features(block),
            "labels": block.label.astype(np.float32),
            "weights": np.full(block.num_targets, weight, dtype=np.float32),
            "row_ids": block.row_id,
            **self.list_user_queries(block),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in arrays.items()}
        return PromptBatch(
            **tensors,
            header_key=hash(tuple(self._header)),
            prefix_lengths=Mirrored.of(prefix.lengths),
            prefix_keys=prefix_keys,
            prefix_rows=Mirrored.of(prefix_rows),
            tree_lengths=Mirrored.of(tree.lengths),
            tree_segments=list_segments(tail.lengths, branch.lengths, owner),
            **slots,
        )

    def _describe_slots(self, block: ContextBlock) -> IntArray | None:
        """Return (C,) hashes of all that the slots of a prefix are made of; None where it has none."""
        if not any(segment.is_slot for segment in self.template.prefix):
            return None
        history = hash_rows(Ragged(block.history_offsets, block.history_items))
        time = np.searchsorted(self._time_cuts, block.timestamp[block.target_offsets[:-1]], side="right")
        return hash_integers(0, history, block.user_idx, block.num_likes, time).view(np.int64)

    def _show_history(self, block: ContextBlock) -> tuple[Ragged, int]:
        """Return the items shown in each context, and how many were dropped because the prompt was too long."""
        history = Ragged(block.history_offsets, block.history_items)
        shown = history.take_last(np.full(block.num_contexts, self._history_length))
        cost = np.zeros(len(shown.values), dtype=np.int64)
        first = 0
        if self.template.has("<ItemTitleList>"):
            cost += self._titles.lengths[shown.values] + len(self._separator)
            first = len(self._separator)  # one separator less than items
        if self.template.has("<ItemIDList>"):
            cost = cost + self.tokens_per_slot
        # An item stays if it and all newer ones of its context fit.
        totals = to_offsets(cost)
        newer = totals[shown.offsets[1:]][shown.rows] - totals[:-1]
        kept = np.bincount(shown.rows[newer - first <= self._budget], minlength=block.num_contexts)
        return shown.take_last(kept), len(shown.values) - int(kept.sum())

    def _lay_out(self, block: ContextBlock, shown: Ragged) -> tuple[Ragged, Ragged, Ragged]:
        """Return what follows the header as token ids and slot codes: prefixes (C rows), tails (C), branches (N)."""
        contexts, targets = block.num_contexts, block.num_targets
        first = self.template.prefix or self.template.tail
        start = [repeat_values(self._bos, np.ones(contexts, dtype=bool))] if self._bos and not self._header else []
        rest = list(itertools.dropwhile(lambda segment: not segment.is_field, first)) if self._header else first
        laid = [*start, *(self._lay_out_context(one, shown) for one in rest)] if first else []
        head, tail = laid, [self._lay_out_context(one, shown) for one in self.template.tail]
        if not self.template.prefix:
            head, tail = [], laid
        branch = [self._lay_out_target(one, block) for one in self.template.branch]
        if self._bos and not first:
            branch.insert(0, repeat_values(self._bos, np.ones(targets, dtype=bool)))
        return join_columns(head, contexts), join_columns(tail, contexts), join_columns(branch, targets)

    def _lay_out_context(self, segment: Segment, shown: Ragged) -> Ragged:
        contexts = len(shown.offsets) - 1
        everywhere = np.ones(contexts, dtype=bool)
        if segment.text == "<ItemTitleList>":
            is_last = np.zeros(len(shown.values), dtype=bool)
            is_last[shown.offsets[1:][shown.lengths > 0] - 1] = True
            items = [self._titles.take(shown.values), repeat_values(self._separator, ~is_last)]
            listed = join_columns(items, len(shown.values)).merge(shown.offsets)
            return join_columns([listed, repeat_values(self._empty, shown.lengths == 0)], contexts)
        if segment.text == "<ItemIDList>":
            codes = [HISTORY] + [CONTINUED] * (self.tokens_per_slot - 1)
            return repeat_values(codes, np.ones(len(shown.values), dtype=bool)).merge(shown.offsets)
        return repeat_values(self._get_constant(segment), everywhere)

    def _lay_out_target(self, segment: Segment, block: ContextBlock) -> Ragged:
        if segment.text == "<TargetItemTitle>":
            return self._titles.take(block.item_idx)
        return repeat_values(self._get_constant(segment), np.ones(block.num_targets, dtype=bool))

    def _get_constant(self, segment: Segment) -> list[int]:
        if segment.is_slot:
            return [SLOT_CODES[segment.text]] + [CONTINUED] * (self.tokens_per_slot - 1)
        return self._texts[segment.text]

    def list_user_queries(self, block: ContextBlock) -> dict[str, IntArray]:
        """Return ``user_idx``, ``user_history``, ``user_target`` and ``user_timestamps``, as in ``PromptBatch``."""
        history = Ragged(block.history_offsets, block.history_items)
        history = history.take_last(np.full(block.num_contexts, self._cf_history_length))
        matrix = np.full((block.num_contexts, self._cf_history_length), -1, dtype=np.int64)
        shift = self._cf_history_length - history.lengths
        matrix[history.rows, history.columns + shift[history.rows]] = history.values
        if not self._user_depends_on_target:
            nothing = np.full(block.num_contexts, -1, dtype=np.int64)
            times = block.timestamp[block.target_offsets[:-1]]
            return {
                "user_idx": block.user_idx, "user_history": matrix, "user_target": nothing, "user_timestamps": times
            }  # fmt: skip
        owner = block.target_contexts
        return {
            "user_idx": block.user_idx[owner],
            "user_history": matrix[owner],
            "user_target": block.item_idx,
            "user_timestamps": block.timestamp,
        }


def list_segments(tails: IntArray, branches: IntArray, owner: IntArray) -> Segments:
    """Return what a tree consists of: (C,) tokens of tails, (N,) tokens of branches, and (N,) the row of each."""
    lengths, rows = np.concatenate([tails, branches]), np.concatenate([np.arange(len(tails)), owner])
    seen = np.concatenate([np.zeros_like(tails), tails[owner]])
    order = np.argsort(rows, kind="stable")  # a row's tail, and then its branches
    order = order[lengths[order] > 0]
    return Segments(Mirrored.of(lengths[order]), Mirrored.of(rows[order]), Mirrored.of(seen[order]))


def build_collator(
    config: Config,
    run_dir: RunDir,
    tokenizer: Any,
    stage: Literal["stage1", "stage2"],
    *,
    user_depends_on_target: bool = False,
    time_cuts: Sequence[int] = (),
) -> PromptCollator:
    """Return the collator of a stage.

    Args:
        config: the experiment.
        run_dir: whose data step is done.
        tokenizer: of the backbone.
        stage: whose prompt.
        user_depends_on_target, time_cuts: see ``PromptCollator``.

    Raises:
        ConfigError: the prompt is wrong.
        ArtifactError: the data step is not done.
    """
    template = PromptTemplate.parse(
        load_prompt_text(config.prompt.stage2 if stage == "stage2" else config.prompt.stage1),
        allow_slots=stage == "stage2",
        user_depends_on_target=user_depends_on_target,
    )
    data_dir: Path = run_dir.step_dir("data")
    texts = load_item_table(data_dir)["text"]
    return PromptCollator(
        template,
        load_item_tokens(run_dir.path / "item_tokens", texts, tokenizer, config.prompt.max_title_tokens),
        tokenizer,
        history_length=config.prompt.history_length,
        cf_history_length=config.preprocessing.max_history_length,
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        empty_history_text=config.prompt.empty_history_text,
        tokens_per_slot=config.mapping.tokens_per_slot,
        user_depends_on_target=user_depends_on_target,
        time_cuts=time_cuts,
    )
