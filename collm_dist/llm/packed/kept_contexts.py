"""Keys and values of contexts, kept between the requests of a ranking service.

A returning user's context equals the kept one, or begins with the same tokens if events were appended to the history.
Contexts that begin alike share that part in a radix tree, and only what follows it is computed. The keys of tokens say
what they are: ids, or the vectors in slots (``llm/token_keys.py``). So a context finds what was computed from the same
content at the same positions, and nothing else.

Shapes: S contexts, p tokens of a context; L layers, G key/value heads, W width of a head.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm_dist.llm.packed.attention import KeyValues
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.passes import Prefix, extend_prefixes, run_prefix
from collm_dist.prompt_batch import Mirrored

# (p, 2) int64, see ``llm/token_keys.py``.
TokenKeys = NDArray[np.int64]
# Passes of which the fastest gives the time of a context token. A median would count the slow passes of a busy machine,
# and the overhead of short contexts, which reuse does not save: it was 1.4 to 1.9 times the time saved.
_TIMED_PASSES = 32
# Fewer kept tokens are computed again: contexts of different users begin with the same quotation mark, and attention
# after kept tokens needs a mask.
LEAST_KEPT_TOKENS = 8


@dataclass
class ReuseCounts:
    """Counts of found and computed contexts and tokens.

    Attributes:
        whole, part, none: contexts of which all tokens were kept, some, and none.
        kept_tokens, computed_tokens: tokens of contexts that were found and computed.
        saved_s: seconds that the found tokens would have taken, at the measured time of a context token.
    """

    whole: int = 0
    part: int = 0
    none: int = 0
    kept_tokens: int = 0
    computed_tokens: int = 0
    saved_s: float = 0.0


class _Node:
    """Tokens that follow those of the parent, with their keys and values, (L, 2, n, G, W)."""

    __slots__ = ("children", "keys", "parent", "states")

    def __init__(self, parent: _Node | None, keys: TokenKeys, states: Tensor) -> None:
        self.parent, self.keys, self.states = parent, keys, states
        self.children: dict[bytes, _Node] = {}

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes + self.keys.nbytes


class KeptContexts:
    """Keys and values of the most recently used contexts, on the model's device. It is not thread-safe.

    The least recently used nodes are dropped first, and children before their parents.

    Attributes:
        num_bytes: bytes held, never more than ``max_bytes`` between passes.
        max_bytes: their limit.
    """

    def __init__(self, max_bytes: int, version: Hashable = None) -> None:
        """Start empty.

        Args:
            max_bytes: limit of the memory.
            version: of the model; contexts of another version are never found.
        """
        self.max_bytes, self._version = max_bytes, version
        self.num_bytes = 0
        self._roots: dict[Hashable, _Node] = {}
        # Least recently used first. A parent is used whenever a child is, and after it, so the first is a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._counts = ReuseCounts()
        self._token_seconds: deque[float] = deque(maxlen=_TIMED_PASSES)
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []

    def drop(self) -> None:
        """Drop all contexts."""
        self._roots.clear()
        self._order.clear()
        self.num_bytes = 0

    def take_counts(self) -> ReuseCounts:
        """Return the counts since the last call."""
        counts, self._counts = self._counts, ReuseCounts()
        return counts

    @property
    def token_seconds(self) -> float:
        """Measured time of a context token in seconds, of the fastest recent pass that reused nothing; 0 before."""
        while self._timed and self._timed[0][1].query():  # type: ignore[no-untyped-call]
            start, end, tokens = self._timed.pop(0)
            self._token_seconds.append(start.elapsed_time(end) / 1000 / tokens)
        return min(self._token_seconds, default=0.0)

    @torch.no_grad()
    def run(
        self,
        decoder: PackedDecoder,
        embeds: Tensor,
        lengths: Mirrored,
        keys: Sequence[TokenKeys],
        header: Prefix | None = None,
        start: Hashable = None,
    ) -> Prefix:
        """Return the result of ``run_prefix``, computing only the tokens after the longest kept beginning of each.

        Args:
            decoder, embeds, lengths, header: see ``run_prefix``.
            keys: (S,) token keys of each context.
            start: identifies the header.
        """
        root = self._roots.setdefault(
            (self._version, start), _Node(None, np.zeros((0, 2), np.int64), embeds.new_empty(0))
        )
        paths = [_find(root, row_keys) for row_keys in keys]
        paths = [
            path if sum(count for _, count in path) >= min(LEAST_KEPT_TOKENS, len(row_keys)) else []
            for path, row_keys in zip(paths, keys, strict=True)
        ]
        self._use(node for path in paths for node, _ in path)
        states = [[node.states[:, :, :count] for node, count in path] for path in paths]
        found = [sum(count for _, count in path) for path in paths]
        self._count(found, lengths.numbers)
        computed = self._compute(decoder, embeds, lengths, header, states, found)
        for row, new_states in computed.items():
            states[row].append(new_states)
            self._add(root, keys[row], states[row])
        return _join(states, lengths, header)

    def _count(self, found: Sequence[int], lengths: NDArray[np.int64]) -> None:
        counts, numbers = self._counts, np.asarray(found)
        counts.whole += int((numbers == lengths).sum())
        counts.none += int((numbers == 0).sum())
        counts.part += int(((numbers > 0) & (numbers < lengths)).sum())
        counts.kept_tokens += int(numbers.sum())
        counts.computed_tokens += int((lengths - numbers).sum())
        counts.saved_s += int(numbers.sum()) * self.token_seconds

    def _compute(
        self,
        decoder: PackedDecoder,
        embeds: Tensor,
        lengths: Mirrored,
        header: Prefix | None,
        states: Sequence[Sequence[Tensor]],
        found: Sequence[int],
    ) -> dict[int, Tensor]:
        """Return the (L, 2, n, G, W) keys and values of the n tokens of each row that were not found."""
        rows = [row for row, count in enumerate(found) if count < lengths.numbers[row]]
        if not rows:
            return {}
        row_embeds = torch.split(embeds, lengths.numbers.tolist())
        new_embeds = torch.cat([row_embeds[row][found[row] :] for row in rows])
        counts = np.array([found[row] for row in rows], np.int64)
        new_lengths = Mirrored.of(lengths.numbers[rows] - counts, embeds.device)
        if not counts.any():
            recorded = self._run_timed(decoder, new_embeds, new_lengths, header)
        else:
            kept = _join([states[row] for row in rows], Mirrored.of(counts, embeds.device), header)
            recorded = extend_prefixes(decoder, new_embeds, new_lengths, kept)
        whole = torch.stack([torch.stack(layer) for layer in recorded])
        parts = torch.split(whole, new_lengths.numbers.tolist(), dim=2)
        return {row: part.clone() for row, part in zip(rows, parts, strict=True)}

    def _run_timed(
        self, decoder: PackedDecoder, embeds: Tensor, lengths: Mirrored, header: Prefix | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of whole contexts by layer, and measure the time of a token."""
        if embeds.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            prefix = run_prefix(decoder, embeds, lengths, header)
            end.record()
            self._timed.append((start, end, len(embeds)))
        else:
            started = time.perf_counter()
            prefix = run_prefix(decoder, embeds, lengths, header)
            self._token_seconds.append((time.perf_counter() - started) / len(embeds))
        return [(keys[-1], values[-1]) for keys, values in prefix.layers]

    def _use(self, nodes: Iterable[_Node]) -> None:
        """Mark nodes as used, each before its parent."""
        for node in reversed(list(nodes)):
            self._order.move_to_end(node)

    def _add(self, root: _Node, keys: TokenKeys, states: Sequence[Tensor]) -> None:
        """Keep a context as far as it is not kept yet, and drop what no longer fits.

        Args:
            root: of the tree.
            keys: its tokens.
            states: keys and values in parts, the last of them computed just now.
        """
        path = _find(root, keys)
        count = sum(length for _, length in path)
        new = states[-1]
        if new.shape[2] != len(keys) - count:  # of the same pass, or dropped by it
            new = torch.cat(list(states), dim=2)[:, :, count:].clone()
        if count == len(keys) or new.nbytes > self.max_bytes:
            return
        parent = root
        if path:
            parent, length = path[-1]
            if length < len(parent.keys):
                parent = self._split(parent, length)
        leaf = _Node(parent, keys[count:].copy(), new)
        parent.children[keys[count].tobytes()] = leaf
        self.num_bytes += leaf.num_bytes
        self._order[leaf] = None
        while parent is not root:
            self._order.move_to_end(parent)
            assert parent.parent is not None
            parent = parent.parent
        while self.num_bytes > self.max_bytes:
            self._drop_oldest()

    def _split(self, node: _Node, count: int) -> _Node:
        """Divide a node after some of its tokens, and return the first part."""
        assert node.parent is not None
        # Everything that needs memory comes first: running out of it must leave the tree as it was.
        first = _Node(node.parent, node.keys[:count].copy(), node.states[:, :, :count].clone())
        keys, states = node.keys[count:].copy(), node.states[:, :, count:].clone()
        node.parent.children[node.keys[0].tobytes()] = first
        node.parent, node.keys, node.states = first, keys, states
        first.children[node.keys[0].tobytes()] = node
        self._order[first] = None
        return first

    def _drop_oldest(self) -> None:
        node, _ = self._order.popitem(last=False)
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.keys[0].tobytes()]
        self.num_bytes -= node.num_bytes


def _find(root: _Node, keys: TokenKeys) -> list[tuple[_Node, int]]:
    """Return the nodes of the longest kept beginning of a context, and how many tokens of each it has."""
    path: list[tuple[_Node, int]] = []
    node, place = root, 0
    while place < len(keys) and (child := node.children.get(keys[place].tobytes())) is not None:
        count = min(len(child.keys), len(keys) - place)
        differs = (child.keys[:count] != keys[place : place + count]).any(axis=1)
        if differs.any():
            count = int(differs.argmax())
        path.append((child, count))
        if count < len(child.keys):
            break
        node, place = child, place + count
    return path


def _join(states: Sequence[Sequence[Tensor]], lengths: Mirrored, header: Prefix | None) -> Prefix:
    """Return contexts, whose keys and values are in parts, as prefixes after a header."""
    parts = [part for row in states for part in row]
    past: Sequence[KeyValues] = [((), ())] * len(parts[0]) if header is None else header.layers
    layers: list[KeyValues] = [
        (
            (*past_keys, *(part[layer, 0] for part in parts)),
            (*past_values, *(part[layer, 1] for part in parts)),
        )
        for layer, (past_keys, past_values) in enumerate(past)
    ]
    return Prefix(layers, lengths, 0 if header is None else int(header.lengths.numbers[0]))
