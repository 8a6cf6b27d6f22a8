"""Keys and values of constant prefixes, kept from one epoch or validation to the next (stage 2, frozen backbone).

Shapes: S prefixes, p tokens of a prefix; L layers, G key/value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collm_dist.llm.packed.attention import KeyValues
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.passes import Prefix, run_prefix
from collm_dist.prompt_batch import Mirrored

# Runs prefixes as ``run_prefix`` does, given their numbers in the micro-batch as well.
RunPrefixes = Callable[[PackedDecoder, Tensor, Mirrored, Prefix | None, Sequence[int]], Prefix]


class PrefixCache:
    """Keys and values of prefixes in host memory, added as they are computed until the memory granted is full.

    Nothing is evicted: an epoch visits every context once, so a full cache that evicts its oldest entry would never
    hit.

    Attributes:
        num_bytes: held.
        hits, misses: prefixes found and computed so far.
    """

    def __init__(self, max_bytes: int, any_process: Callable[[bool], bool] = lambda condition: condition) -> None:
        """Start empty.

        Args:
            max_bytes: limit of the memory.
            any_process: returns whether a condition holds on any process. If weights are partitioned over processes,
                running the backbone is collective, so either all processes run it or none does.
        """
        self._max_bytes, self._any_process = max_bytes, any_process
        self._entries: dict[int, Tensor] = {}
        self.num_bytes = self.hits = self.misses = 0

    @torch.no_grad()
    def run(
        self,
        decoder: PackedDecoder,
        embeds: Tensor,
        lengths: Mirrored,
        keys: Sequence[int],
        header: Prefix | None = None,
        compute: RunPrefixes | None = None,
    ) -> Prefix:
        """Return the result of ``run_prefix``, computing only the prefixes that are not in the cache.

        Args:
            decoder, embeds, lengths, header: see ``run_prefix``.
            keys: (S,) identifiers of the prefixes.
            compute: runs the missing prefixes; None = ``run_prefix``.
        """
        missing = [row for row, key in enumerate(keys) if key not in self._entries]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        computed: dict[int, Tensor] = {}
        if self._any_process(bool(missing)):
            rows = missing or [0]
            row_embeds = torch.split(embeds, lengths.numbers.tolist())
            row_lengths = Mirrored.of(lengths.numbers[rows], embeds.device)
            packed = torch.cat([row_embeds[row] for row in rows])
            if compute is None:
                prefix = run_prefix(decoder, packed, row_lengths, header)
            else:
                prefix = compute(decoder, packed, row_lengths, header, rows)
            if len(missing) < len(keys) or self.num_bytes < self._max_bytes:
                computed = dict(zip(missing, _divide(prefix), strict=False))
            self._add({keys[row]: entry for row, entry in computed.items()})
            if len(missing) == len(keys):
                return prefix
        stored = (computed[row] if row in computed else self._entries[key] for row, key in enumerate(keys))
        entries = [entry.to(embeds.device, non_blocking=True) for entry in stored]
        past = [((), ())] * len(entries[0]) if header is None else header.layers
        layers: list[KeyValues] = [
            (
                (*past_keys, *(entry[layer, 0] for entry in entries)),
                (*past_values, *(entry[layer, 1] for entry in entries)),
            )
            for layer, (past_keys, past_values) in enumerate(past)
        ]
        return Prefix(layers, lengths, 0 if header is None else int(header.lengths.numbers[0]))

    def _add(self, entries: dict[int, Tensor]) -> None:
        """Add entries as far as they fit."""
        for key, entry in entries.items():
            if self.num_bytes + entry.nbytes <= self._max_bytes and key not in self._entries:
                self._entries[key] = entry.cpu()
                self.num_bytes += entry.nbytes


def _divide(prefix: Prefix) -> list[Tensor]:
    """Return the keys and values of each prefix without the header's, (L, 2, p, G, W) each."""
    first = 1 if prefix.header else 0
    whole = torch.stack(
        [torch.stack([torch.cat(keys[first:]), torch.cat(values[first:])]) for keys, values in prefix.layers]
    )
    return [part.clone() for part in torch.split(whole, prefix.lengths.numbers.tolist(), dim=2)]
