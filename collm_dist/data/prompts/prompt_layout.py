"""Collator of prompts: blocks of indices to the tensors that the model reads.

During layout, slots are negative codes among the token ids; they are then resolved to positions, so no content of a
title can be mistaken for a slot.

Shapes: C contexts, N targets, H history items.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collm_dist.data.prompts import title_lists
from collm_dist.data.prompts.context_texts import ContextTexts, ShownItems
from collm_dist.data.prompts.item_tokens import TextTokens
from collm_dist.data.prompts.prompt_template import PromptTemplate, Segment
from collm_dist.data.prompts.ragged import Ragged, hash_rows, join_columns, repeat_values, take_distinct
from collm_dist.data.prompts.slot_codes import CONTINUED, HISTORY, SLOT_CODES, Masking, PromptTokens, find_slots
from collm_dist.data.samples.pair_features import compute_pair_features
from collm_dist.data.samples.user_samples import locate
from collm_dist.data.shards.context_block import ContextBlock, IntArray, build_unknown_users, pad_histories
from collm_dist.errors import ConfigError
from collm_dist.prompt_batch import TAIL, Mirrored, PromptBatch, Segments
from collm_dist.random_keys import hash_integers

# Targets of a row without a history: its context is short, and repeating it costs less than masked attention.
_TARGETS_PER_ROW = 8


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of a block: (C,) constant prefixes, (C,) context tails, (N,) branches, and the common header."""

    prefix: IntArray
    tail: IntArray
    branch: IntArray
    header: int = 0


class PromptCollator:
    """Collator of the prompts of one stage.

    Attributes:
        template: the prompt template.
        tokens_per_slot: number of soft tokens per slot.
        has_anchors: whether scores start from anchors.
        scores_titles: whether scores are read from the tokens of the targets' titles.
        num_cut_titles, num_cut_users: numbers of item texts cut at ``prompt.max_title_tokens``, and of user texts cut
            at ``prompt.max_user_text_tokens``.
        num_dropped_history, num_dropped_ratings, num_dropped_dislikes: items dropped so far because a prompt was too
            long.
    """

    def __init__(
        self,
        template: PromptTemplate,
        item_tokens: TextTokens,
        tokenizer: Any,
        *,
        history_length: int,
        cf_history_length: int,
        max_prompt_tokens: int,
        empty_history_text: str,
        tokens_per_slot: int,
        user_depends_on_target: bool,
        time_cuts: Sequence[int] = (),
        compute_anchors: Callable[[ContextBlock], NDArray[np.float32]] | None = None,
        disliked_length: int = title_lists.DEFAULT_DISLIKED_LENGTH,
        empty_dislikes_text: str | None = None,
        user_tokens: TextTokens | None = None,
        rated_length: int = title_lists.DEFAULT_RATED_LENGTH,
        rated_marks: tuple[str, str] = title_lists.DEFAULT_RATED_MARKS,
        scores_titles: bool = False,
    ) -> None:
        """Tokenize the template.

        Args:
            template: the prompt template.
            item_tokens: token ids of all items.
            tokenizer: tokenizer of the backbone.
            history_length: maximum number of history items in the prompt.
            cf_history_length: maximum number of history items for the user vector.
            max_prompt_tokens: the oldest history items are dropped to fit.
            empty_history_text: text in place of an empty history.
            tokens_per_slot: number of soft tokens per slot.
            user_depends_on_target: whether each target has a separate user vector.
            time_cuts: timestamps (seconds) at which the vectors behind the slots change; see ``cut_contexts``.
            compute_anchors: returns the (N,) anchors of a block's targets; None = all are 0.
            disliked_length: maximum number of disliked items in the prompt.
            empty_dislikes_text: text in place of an empty list of dislikes; None = ``empty_history_text``.
            user_tokens: token ids of the users' texts; the last text is that of a user without one. None = the template
                has no user text.
            rated_length: maximum number of items in the list of rated items.
            rated_marks: texts after a liked and a disliked title in that list.
            scores_titles: whether scores are read from the tokens of the targets' titles.

        Raises:
            ConfigError: the prompt does not fit ``max_prompt_tokens`` even without a history.
        """
        self.template = template
        self.num_dropped_history = self.num_dropped_ratings = self.num_dropped_dislikes = 0
        self.num_cut_titles = item_tokens.num_cut
        self.num_cut_users = 0 if user_tokens is None else user_tokens.num_cut
        self._titles, users = item_tokens.to_ragged(), None if user_tokens is None else user_tokens.to_ragged()
        self._cf_history_length, self.scores_titles = cf_history_length, scores_titles
        self.tokens_per_slot, self._user_depends_on_target = tokens_per_slot, user_depends_on_target
        self._time_cuts = np.asarray(time_cuts, dtype=np.int64)
        self._compute_anchors, self.has_anchors = compute_anchors, compute_anchors is not None

        def tokenize(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._context = ContextTexts(
            template,
            self._titles,
            users,
            tokenize,
            tokens_per_slot=tokens_per_slot,
            history_length=history_length,
            disliked_length=disliked_length,
            rated_length=rated_length,
            empty_history_text=empty_history_text,
            empty_dislikes_text=empty_dislikes_text,
            rated_marks=rated_marks,
        )
        self._texts = {segment.text: tokenize(segment.text) for segment in template.segments if not segment.is_field}
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._bos: list[int] = [bos] if adds_bos else []
        self._header = self._find_header()
        self._filler_id = bos if bos is not None else 0
        self._budget = max_prompt_tokens - self._count_fixed_tokens()
        self._check_room(max_prompt_tokens, has_user_text=users is not None)

    def _check_room(self, max_prompt_tokens: int, *, has_user_text: bool) -> None:
        if (room := self._budget - self._context.num_least) < 0:
            settings = "prompt.max_title_tokens" + (" or prompt.max_user_text_tokens" if has_user_text else "")
            raise ConfigError(
                f"prompt.max_prompt_tokens={max_prompt_tokens}: the prompt needs {max_prompt_tokens - room} tokens "
                f"before any history is shown; raise it, or lower {settings}"
            )

    def _find_header(self) -> list[int]:
        """Return the tokens that all prompts start with; empty if their region has no field after them."""
        region = self.template.prefix or self.template.tail
        if not any(segment.is_field for segment in region):
            return []
        texts = itertools.takewhile(lambda segment: not segment.is_field, region)
        return self._bos + [token for segment in texts for token in self._texts[segment.text]]

    def _count_fixed_tokens(self) -> int:
        """Return the number of tokens besides the user's text and lists of items, assuming the longest target title.

        So the history in a prompt does not depend on which targets share the context.
        """
        total = len(self._bos) + self._context.num_fixed
        for segment in self.template.segments:
            if segment.text == "<TargetItemTitle>":
                total += int(self._titles.lengths.max(initial=0))
            elif segment.is_slot and segment.text != "<ItemIDList>":
                total += self.tokens_per_slot
            elif not segment.is_field:
                total += len(self._texts[segment.text])
        return total

    def for_scoring(self, *, slots: bool = True) -> PromptCollator:
        """Return a collator for passes without training, in which the whole context is a constant prefix.

        Args:
            slots: whether a prefix may contain slots. It may not if prefixes are cached across passes or slots are
                refilled; then a context with slots keeps its tail.
        """
        if not slots and any(segment.is_slot for segment in self.template.tail):
            return self
        scoring = copy.copy(self)
        context = self.template.prefix + self.template.tail
        scoring.template = dataclasses.replace(self.template, prefix=context, tail=())
        scoring._header = scoring._find_header()
        return scoring

    def cut_contexts(self, block: ContextBlock) -> ContextBlock:
        """Return the block with contexts cut at time cuts, and where the rated or disliked items in the prompt change.

        All targets of a context then use the vectors of one time and one prompt, however a batch is divided later.
        """
        if len(self._time_cuts):
            block = block.cut_where_changed(np.searchsorted(self._time_cuts, block.timestamp, side="right"))
        return self._context.cut(block)

    def count_tokens(self, block: ContextBlock) -> TokenCounts:
        """Return the token counts of the block's prompts."""
        prefix, tail, branch = self._lay_out(block, self._context.choose(block, self._budget))
        return TokenCounts(prefix.lengths, tail.lengths, branch.lengths, len(self._header))

    def collate(
        self,
        block: ContextBlock | None,
        example: ContextBlock,
        masking: Masking | None = None,
        groups: IntArray | None = None,
    ) -> PromptBatch:
        """Lay out a micro-batch.

        Args:
            block: contexts and targets; None = a filler with zero weight.
            example: any non-empty block of the same batch, as the source of a filler.
            masking: random masking of slots; None outside training.
            groups: groups of the example's targets, if it is the whole global batch; None = lists are the groups.
        """
        weight = 0.0 if block is None else 1.0
        if block is None:
            block = example.take_targets(np.arange(1))
        shown = self._context.choose(block, self._budget)
        self.num_dropped_history += shown.dropped["<ItemTitleList>"]
        self.num_dropped_ratings += shown.dropped["<RatedTitleList>"]
        self.num_dropped_dislikes += shown.dropped["<DislikedTitleList>"]
        prefix, tail, branch = self._lay_out(block, shown)
        branches = branch.merge(block.target_offsets)
        tree = join_columns([tail, branches], block.num_contexts)

        # Position of each branch token in the tree: after its row's tail.
        rows = (owner := block.target_contexts)[branch.rows]
        branch_positions = (
            tree.offsets[rows] + tail.lengths[rows] + np.arange(len(branch.values)) - branches.offsets[rows]
        )
        targets = np.full(len(tree.values), TAIL)
        targets[branch_positions] = branch.rows
        start = len(self._header) + prefix.lengths
        positions = start[tree.rows] + tree.columns
        positions[branch_positions] = (start + tail.lengths)[rows] + branch.columns

        contexts = hash_integers(0, block.user_idx, block.num_likes).view(np.int64)
        prefix, prefix_keys, prefix_rows = take_distinct(prefix, self._describe_slots(block))
        firsts = np.unique(prefix_rows, return_index=True)[1]
        tokens = PromptTokens(
            np.concatenate([prefix.values, tree.values]),
            np.concatenate([firsts[prefix.rows], tree.rows]),
            np.concatenate([np.full(len(prefix.values), TAIL), targets]),
        )
        slots = find_slots(
            block, tokens, shown.history, contexts, masking, user_depends_on_target=self._user_depends_on_target
        )
        arrays: dict[str, Any] = {
            "header_ids": np.array(self._header, dtype=np.int64),
            "prefix_ids": np.where(prefix.values < 0, self._filler_id, prefix.values),
            "context_keys": contexts,
            "tree_ids": np.where(tree.values < 0, self._filler_id, tree.values),
            "tree_targets": targets,
            "tree_positions": positions,
            "last": branch_positions[branch.offsets[1:] - 1],
            "title_places": branch_positions[self._find_predictors(block, branch.offsets[:-1])],
            "pair_features": compute_pair_features(block),
            "anchors": self.compute_anchors(block),
            "labels": block.label.astype(np.float32),
            "weights": np.full(block.num_targets, weight, dtype=np.float32),
            "row_ids": block.row_id,
            "lists": block.group_id,
            "groups": block.group_id if groups is None else groups[locate(example.row_id, block.row_id)],
            **self.list_user_queries(block),
        }
        tensors: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
        return PromptBatch(
            **tensors,
            header_key=hash(tuple(self._header)),
            prefix_lengths=Mirrored.of(prefix.lengths),
            prefix_keys=prefix_keys,
            target_items=block.item_idx,
            prefix_rows=Mirrored.of(prefix_rows),
            tree_lengths=Mirrored.of(tree.lengths),
            tree_segments=Segments.build(tail.lengths, branch.lengths, owner),
            **slots,
        )

    def _find_predictors(self, block: ContextBlock, starts: IntArray) -> IntArray:
        """Return the (T,) branch tokens that predict the titles' tokens; see ``PromptBatch.title_places``.

        Args:
            block: the micro-batch.
            starts: (N,) first token of each branch.
        """
        if not self.scores_titles:
            return np.zeros(0, dtype=np.int64)
        before = itertools.takewhile(lambda segment: segment.text != "<TargetItemTitle>", self.template.branch)
        has_bos = self._bos and not (self.template.prefix or self.template.tail)
        first = len(self._bos) * bool(has_bos) + sum(len(self._get_constant(segment)) for segment in before)
        lengths = self._titles.lengths[block.item_idx] - 1
        owners = np.repeat(np.arange(block.num_targets), lengths)
        columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        predictors: IntArray = (starts + first)[owners] + columns
        return predictors

    def lay_out_without_history(self, items: IntArray) -> PromptBatch:
        """Return the prompts of a user without a history, in which titles have the likelihoods that histories change.

        Args:
            items: (N,) dense items of the targets.
        """
        plain = copy.copy(self)
        plain.template = dataclasses.replace(self.template, prefix=(), tail=self.template.prefix + self.template.tail)
        plain._header, plain._compute_anchors = plain._find_header(), None
        block = build_unknown_users(items, _TARGETS_PER_ROW)
        return plain.collate(block, block)

    def compute_anchors(self, block: ContextBlock) -> NDArray[np.float32]:
        """Return the (N,) anchors of a block's targets, 0 without an anchor."""
        anchors = self._compute_anchors
        return np.zeros(block.num_targets, np.float32) if anchors is None else anchors(block)

    def _describe_slots(self, block: ContextBlock) -> IntArray | None:
        """Return (C,) hashes of the inputs of the prefix's slots, or None if the prefix has no slots."""
        if not any(segment.is_slot for segment in self.template.prefix):
            return None
        history = hash_rows(Ragged(block.history_offsets, block.history_items))
        time = np.searchsorted(self._time_cuts, block.timestamp[block.target_offsets[:-1]], side="right")
        return hash_integers(0, history, block.user_idx, block.num_likes, time).view(np.int64)

    def _lay_out(self, block: ContextBlock, shown: ShownItems) -> tuple[Ragged, Ragged, Ragged]:
        """Return token ids and slot codes after the header: prefixes (C rows), tails (C rows), branches (N rows)."""
        contexts, targets = block.num_contexts, block.num_targets
        first = self.template.prefix or self.template.tail
        start = [repeat_values(self._bos, np.ones(contexts, dtype=bool))] if self._bos and not self._header else []
        rest = list(itertools.dropwhile(lambda segment: not segment.is_field, first)) if self._header else first
        laid = [*start, *(self._lay_out_context(segment, block, shown) for segment in rest)] if first else []
        head, tail = laid, [self._lay_out_context(segment, block, shown) for segment in self.template.tail]
        if not self.template.prefix:
            head, tail = [], laid
        branch = [self._lay_out_target(segment, block) for segment in self.template.branch]
        if self._bos and not first:
            branch.insert(0, repeat_values(self._bos, np.ones(targets, dtype=bool)))
        return join_columns(head, contexts), join_columns(tail, contexts), join_columns(branch, targets)

    def _lay_out_context(self, segment: Segment, block: ContextBlock, shown: ShownItems) -> Ragged:
        if segment.is_field and not segment.is_slot:
            return self._context.lay_out(segment.text, block, shown)
        if segment.text == "<ItemIDList>":
            codes = [HISTORY] + [CONTINUED] * (self.tokens_per_slot - 1)
            return repeat_values(codes, np.ones(len(shown.history.values), dtype=bool)).merge(shown.history.offsets)
        return repeat_values(self._get_constant(segment), np.ones(block.num_contexts, dtype=bool))

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
        matrix = pad_histories(block, self._cf_history_length)
        if not self._user_depends_on_target:
            no_target = np.full(block.num_contexts, -1, dtype=np.int64)
            times = block.timestamp[block.target_offsets[:-1]]
            return {
                "user_idx": block.user_idx, "user_history": matrix, "user_target": no_target, "user_timestamps": times
            }  # fmt: skip
        owner = block.target_contexts
        return {
            "user_idx": block.user_idx[owner],
            "user_history": matrix[owner],
            "user_target": block.item_idx,
            "user_timestamps": block.timestamp,
        }
