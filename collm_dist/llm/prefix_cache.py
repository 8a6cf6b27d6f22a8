"""Keys and values of constant prefixes, kept from one epoch or validation to the next (stage 2, frozen backbone).

Shapes: C contexts, P prefix tokens, D model width; L layers, H key/value heads, d width of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collm_dist.llm.shared_context import Prefix, run_prefix


class PrefixCache:
    """Remembers each prefix's keys and values in host memory, as computed, until the memory granted is full.

    Nothing is ever thrown out for something newer: epochs visit every context once, and of prefixes visited in turn an
    overfull cache that forgets the oldest would find none.

    Attributes:
        num_bytes: held.
        hits, misses: prefixes found and computed so far.
    """

    def __init__(self, max_bytes: int, any_process: Callable[[bool], bool] = lambda one: one) -> None:
        """Start empty.

        Args:
            max_bytes: held at most.
            any_process: says whether a condition holds on any process. Where weights are partitioned over processes,
                running the backbone is collective, so either all of them run it or none.
        """
        self._max_bytes, self._any_process = max_bytes, any_process
        self._held: dict[int, Tensor] = {}
        self.num_bytes = self.hits = self.misses = 0

    @torch.no_grad()
    def run(
        self,
        decoder: nn.Module,
        embeds: Tensor,
        lengths: Tensor,
        keys: Sequence[int],
        places: Tensor | None = None,
        header: Prefix | None = None,
    ) -> Prefix:
        """Return what ``run_prefix`` would, computing only the prefixes that are not held.

        Args:
            decoder: the model below the language-modelling head.
            embeds, lengths: (C, P, D) right-padded prefixes and their (C,) lengths.
            keys: (C,) what the prefixes are known by.
            places, header: see ``run_prefix``.
        """
        missing = [row for row, key in enumerate(keys) if key not in self._held]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        computed: Prefix | None = None
        if self._any_process(bool(missing)):
            if len(missing) == len(keys):
                computed = run_prefix(decoder, embeds, lengths, places, header)
                self._hold(computed, missing, keys)
                return computed
            rows = torch.tensor(missing or [0], device=embeds.device)
            computed = run_prefix(decoder, embeds[rows], lengths[rows], header=header)
        whole = self._join(computed, missing, lengths, embeds.shape[1], keys)
        if computed is not None and missing:
            self._hold(computed, missing, keys)
        return dataclasses.replace(whole, header=header)

    def _hold(self, computed: Prefix, missing: list[int], keys: Sequence[int]) -> None:
        """Keep what has been computed, as far as it fits; (L, 2, H, p, d) for each prefix of p tokens."""
        if self.num_bytes >= self._max_bytes:
            return
        sizes = computed.lengths.tolist()
        for place, row in enumerate(missing):
            parts = [torch.stack([one[place, :, : sizes[place]] for one in layer]) for layer in computed.layers]
            entry = torch.stack(parts).cpu()
            if self.num_bytes + entry.nbytes <= self._max_bytes and keys[row] not in self._held:
                self._held[keys[row]] = entry
                self.num_bytes += entry.nbytes

    def _join(
        self, computed: Prefix | None, missing: list[int], lengths: Tensor, columns: int, keys: Sequence[int]
    ) -> Prefix:
        """Put held and computed prefixes into one batch."""
        found = {row: self._held[key] for row, key in enumerate(keys) if key in self._held}
        sample: Any = next(iter(found.values()))
        num_layers, _, heads, _, width = sample.shape
        shape = (num_layers, 2, len(keys), heads, columns, width)
        whole = torch.zeros(shape, dtype=sample.dtype, device=lengths.device)
        for row, entry in found.items():
            whole[:, :, row, :, : entry.shape[3]] = entry.to(lengths.device, non_blocking=True)
        if computed is not None and missing:
            rows = torch.tensor(missing, device=lengths.device)
            for number, (their_keys, values) in enumerate(computed.layers):
                whole[number, 0, rows], whole[number, 1, rows] = their_keys, values
        return Prefix([(one[0], one[1]) for one in whole], lengths)
