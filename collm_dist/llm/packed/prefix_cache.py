"""Keys and values of constant prefixes, kept from one epoch or validation to the next (stage 2, frozen backbone).

Shapes: S prefixes, one of them p tokens long; L layers, G key/value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from collm_dist.llm.packed.decoder import Parts
from collm_dist.llm.packed.passes import Prefix, run_prefix
from collm_dist.prompt_batch import Mirrored


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
        self, decoder: nn.Module, embeds: Tensor, lengths: Mirrored, keys: Sequence[int], header: Prefix | None = None
    ) -> Prefix:
        """Return what ``run_prefix`` would, computing only the prefixes that are not held.

        Args:
            decoder, embeds, lengths, header: see ``run_prefix``.
            keys: (S,) what the prefixes are known by.
        """
        missing = [row for row, key in enumerate(keys) if key not in self._held]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        computed: dict[int, Tensor] = {}
        if self._any_process(bool(missing)):
            rows = missing or [0]
            of_rows = torch.split(embeds, lengths.numbers.tolist())
            taken = Mirrored.of(lengths.numbers[rows], embeds.device)
            found = run_prefix(decoder, torch.cat([of_rows[row] for row in rows]), taken, header)
            if len(missing) < len(keys) or self.num_bytes < self._max_bytes:
                computed = dict(zip(missing, _divide(found), strict=False))
            self._hold({keys[row]: entry for row, entry in computed.items()})
            if len(missing) == len(keys):
                return found
        held = (computed[row] if row in computed else self._held[key] for row, key in enumerate(keys))
        entries = [one.to(embeds.device, non_blocking=True) for one in held]
        before = [((), ())] * len(entries[0]) if header is None else header.layers
        layers: list[Parts] = [
            ((*of_keys, *(one[layer, 0] for one in entries)), (*values, *(one[layer, 1] for one in entries)))
            for layer, (of_keys, values) in enumerate(before)
        ]
        return Prefix(layers, lengths, 0 if header is None else int(header.lengths.numbers[0]))

    def _hold(self, entries: dict[int, Tensor]) -> None:
        """Keep what has been computed, as far as it fits."""
        for key, entry in entries.items():
            if self.num_bytes + entry.nbytes <= self._max_bytes and key not in self._held:
                self._held[key] = entry.cpu()
                self.num_bytes += entry.nbytes


def _divide(computed: Prefix) -> list[Tensor]:
    """Return each prefix's keys and values without the header's, (L, 2, p, G, W) each."""
    whole = torch.stack([torch.stack([keys[-1], values[-1]]) for keys, values in computed.layers])
    return [one.clone() for one in torch.split(whole, computed.lengths.numbers.tolist(), dim=2)]
