"""How should attention compare shared rows: in blocks of similar rows, all padded together, as sequences, or by flex?

    python -m benchmarks.attention_kernels [--rows 24] [--heads 9 --key-heads 3 --width 64] [--output DIR]

One layer's attention over the tree rows of a micro-batch as stage 2 has them: every row sees a header, a prefix of its
own length, its tail, and its branches themselves alone. Forward and backward, sides in turn. *Blocks* are measured at
several values of what a block is taken to cost (``collm_dist/llm/packed/row_blocks.py``); *sequences* are for a GPU's
kernel (``collm_dist/llm/packed/sequences.py``); *flex* compiles PyTorch's ``flex_attention`` with a block mask over
packed tokens, whose making is measured apart since all layers share it. It has no backward pass on a CPU, so it is
measured on a GPU; with --eager-flex its results are compared anywhere.
Writes attention_kernels_<device>.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.lib.machine import describe_hardware, name_device
from collm_dist.data.prompts.prompt_layout import list_segments
from collm_dist.llm.packed.decoder import NAME, LayerLayout
from collm_dist.llm.packed.passes import Prefix, lay_out_tree
from collm_dist.llm.packed.row_layout import RowLayout
from collm_dist.llm.packed.sequences import SequenceLayout, lay_out_sequences
from collm_dist.prompt_batch import TAIL, Mirrored, Segments
from collm_dist.runs.atomic_files import write_json

COSTS = (0, 1 << 9, 1 << 11, 1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 23)
HEADER, TAIL_TOKENS = 62, 7
# Of the target titles with their slots, and of histories, in tokens: ML-1M's.
BRANCH, PREFIX = (16, 23), (9, 170)


class Workload:
    """Random rows, with queries, keys and values.

    Attributes:
        query, key, value, past: leaves, (1, heads, tokens, width); ``past`` holds the header's and the prefixes' keys
            and values.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        random = np.random.default_rng(arguments.seed)
        branches = [random.integers(*BRANCH, size=count) for count in random.geometric(0.5, arguments.rows).clip(max=9)]
        branches.sort(key=lambda one: int(one.sum()))
        sizes = [TAIL_TOKENS + int(one.sum()) for one in branches]
        prefixes = np.sort(random.integers(*PREFIX, size=arguments.rows))
        self.lengths = Mirrored.of(sizes, device)
        owner = np.repeat(np.arange(len(branches)), [len(one) for one in branches])
        on_host = list_segments(np.full(len(branches), TAIL_TOKENS), np.concatenate(branches), owner)
        parts = (on_host.lengths, on_host.rows, on_host.tails)
        self.segments = Segments(*(Mirrored.of(one.numbers, device) for one in parts))
        self.prefix = Prefix([], Mirrored.of(prefixes, device), HEADER)
        firsts = np.cumsum([0, *map(len, branches)])
        numbers = np.concatenate(
            [
                np.repeat([TAIL, *range(first, first + len(one))], [TAIL_TOKENS, *one])
                for first, one in zip(firsts, branches, strict=False)
            ]
        )
        self.targets = torch.from_numpy(numbers).to(device)
        self.positions = torch.zeros_like(self.targets)  # no window: positions count for nothing
        dtype = getattr(torch, arguments.dtype)
        torch.manual_seed(arguments.seed)

        def draw(heads: int, tokens: int) -> Tensor:
            return torch.randn(1, heads, tokens, arguments.width, device=device, dtype=dtype).requires_grad_()

        own, before = len(numbers), HEADER + int(prefixes.sum())
        self.query = draw(arguments.heads, own)
        self.key, self.value = draw(arguments.key_heads, own), draw(arguments.key_heads, own)
        self.past = draw(arguments.key_heads, before).detach(), draw(arguments.key_heads, before).detach()

    def build_layout(self, cost: int | None) -> LayerLayout:
        """Return our layout for a cost of a block, or as sequences."""
        rows: RowLayout | SequenceLayout
        if cost is None:
            rows = lay_out_sequences(self.segments, self.lengths, HEADER, self.prefix.list_past())
        else:
            rows = lay_out_tree(None, self.targets, self.positions, self.lengths, cost, self.query.dtype, self.prefix)
        keys, values = (one.squeeze(0).transpose(0, 1) for one in self.past)
        return LayerLayout(rows, 0, None, ((keys,), (values,)))

    def attend(self, layout: LayerLayout) -> Tensor:
        """Return (1, M, heads, width)."""
        attend: Any = ALL_ATTENTION_FUNCTIONS[NAME]
        found: Tensor = attend(None, self.query, self.key, self.value, None, layout=layout)[0]
        return found

    def build_block_mask(self) -> BlockMask:
        """Return who sees whom, for ``flex_attention``."""
        device, rows = self.targets.device, self.lengths.list_rows()
        before = torch.cat([torch.full((HEADER,), -1, device=device), self.prefix.lengths.list_rows()])
        key_rows = torch.cat([before, rows])
        key_targets = torch.cat([torch.full_like(before, TAIL), self.targets])
        first = len(before)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_row = (key_rows[key] == rows[query]) | (key < HEADER)
            open_to_it = (key_targets[key] == TAIL) | (key_targets[key] == self.targets[query])
            return same_row & open_to_it & (key <= query + first)

        return create_block_mask(sees, None, None, len(rows), len(key_rows), device=str(device))

    def attend_by_flex(self, attend: Callable[..., Any], mask: BlockMask) -> Tensor:
        """Return (1, M, heads, width)."""
        key, value = (torch.cat(pair, dim=2) for pair in zip(self.past, (self.key, self.value), strict=True))
        inputs = [self.query, key, value]
        if not torch.is_grad_enabled():  # a CPU's refuses inputs that could ask for a gradient
            inputs = [one.detach() for one in inputs]
        found: Tensor = attend(*inputs, block_mask=mask, enable_gqa=True)
        return found.transpose(1, 2)

    def time(self, attend: Callable[[], Tensor]) -> float:
        """Return the seconds of a forward and a backward pass."""
        started = time.perf_counter()
        found = attend()
        torch.autograd.grad(found.float().square().sum(), [self.query, self.key, self.value])
        if self.query.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def compare(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure all sides in turn."""
    work = Workload(arguments, device)
    sides: dict[str, Callable[[], Tensor]] = {}
    blocks: dict[str, int] = {}
    costs: dict[str, int | None] = {"one_block": 1 << 62, **{f"blocks_{cost}": cost for cost in COSTS}}
    if device.type == "cuda":
        costs["sequences"] = None
    for name, cost in costs.items():
        layout = work.build_layout(cost)
        if isinstance(layout.rows, RowLayout):
            blocks[name] = len(layout.rows.blocks)
        sides[name] = lambda layout=layout: work.attend(layout)  # type: ignore[misc]
    record: dict[str, Any] = {"blocks": blocks}
    if device.type == "cuda" or arguments.eager_flex:
        started = time.perf_counter()
        mask = work.build_block_mask()
        record["block_mask_seconds"] = time.perf_counter() - started
        compiled: Any = flex_attention if arguments.eager_flex else torch.compile(flex_attention)
        sides["flex"] = lambda: work.attend_by_flex(compiled, mask)
    with torch.no_grad():
        results = {name: attend().float() for name, attend in sides.items()}
    record["largest_difference"] = {
        name: float((found - results["one_block"]).abs().max()) for name, found in results.items()
    }
    if arguments.eager_flex:
        del sides["flex"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, attend in sides.items():
            seconds[name].append(work.time(attend))
    record["seconds"] = {name: float(np.median(one)) for name, one in seconds.items()}
    record["times_as_fast_as_one_block"] = {
        name: record["seconds"]["one_block"] / one for name, one in record["seconds"].items()
    }
    return record | {"tokens": len(work.targets), "past_tokens": work.past[0].shape[2]}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 24], help="contexts of a micro-batch")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager-flex", action="store_true", help="flex step by step: results alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--suffix", default="", help="added to the name of the result")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    found = {}
    for rows in arguments.rows:
        found[str(rows)] = compare(argparse.Namespace(**{**vars(arguments), "rows": rows}), device)
        ranked = sorted(found[str(rows)]["times_as_fast_as_one_block"].items(), key=lambda one: -one[1])
        print(f"{rows} rows: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ranked), flush=True)
    record = {
        "question": "Which way of comparing shared rows is the fastest?",
        "rows": found,
        "shape": {name: getattr(arguments, name) for name in ("heads", "key_heads", "width", "dtype", "seed")},
        "hardware": describe_hardware(),
    }
    write_json(arguments.output / f"attention_kernels_{name_device()}{arguments.suffix}.json", record)


if __name__ == "__main__":
    main()
