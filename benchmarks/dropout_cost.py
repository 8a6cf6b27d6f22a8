"""How much does LoRA dropout from counters cost, compared with PyTorch's dropout and with none?

    python -m benchmarks.dropout_cost [--checkpointing] [--passes 15]
    python -m benchmarks.dropout_cost --width 4096 --heads 32 --key-heads 32 --inner 11008 --dtype bfloat16

Forward and backward passes over four LoRA layers, the three sides in turn; the second command has the widths of
Llama-7B, the first those of SmolLM2-135M. Prints the result; results/dropout_cost_*.json are its output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import fields

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lib.machine import describe_run
from collm_dist.llm.lora import add_lora
from collm_dist.llm.lora_dropout import DropoutMasks, install_keyed_dropout
from collm_dist.llm.packed.decoder import PackedDecoder
from collm_dist.llm.packed.passes import run_tree
from collm_dist.prompt_batch import TAIL, Mirrored, PromptBatch

SIDES = ("none", "pytorch", "ours")
PROBABILITY = 0.05


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 576), ("inner", 1536), ("heads", 9), ("key-heads", 3), ("layers", 4), ("contexts", 8),
        ("tokens", 256), ("passes", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = build_batch(arguments.contexts, arguments.tokens, device)
    models = {side: build_decoder(arguments, side, device) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(arguments.passes + 2):
        for side in SIDES:
            taken = time_pass(*models[side], batch, number)
            if number >= 2:  # the first two passes warm up
                seconds[side].append(taken)
    medians = {side: statistics.median(taken) for side, taken in seconds.items()}
    report = {
        "settings": vars(arguments),
        **describe_run("torch", "transformers", "peft"),
        "seconds": seconds,
        "median_seconds": medians,
        "cost_share": {side: medians[side] / medians["none"] - 1 for side in SIDES[1:]},
    }
    print(json.dumps(report, indent=2))


def build_decoder(
    arguments: argparse.Namespace, side: str, device: torch.device
) -> tuple[PackedDecoder, DropoutMasks | None]:
    """Return LoRA layers with random weights, and the masks of our dropout."""
    config = LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_heads,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).requires_grad_(False)
    probability = 0.0 if side == "none" else PROBABILITY
    add_lora(model, rank=8, alpha=16, dropout=probability, target_modules=("q_proj", "v_proj"), seed=0)
    masks = install_keyed_dropout(model) if side == "ours" else None
    decoder = model.to(device).get_decoder().train()
    return PackedDecoder(decoder, checkpointing=arguments.checkpointing), masks


def build_batch(contexts: int, tokens: int, device: torch.device) -> PromptBatch:
    """Return rows whose second half belongs to a target; fields that dropout does not read are empty."""
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    columns, rows = torch.arange(tokens, device=device), torch.arange(contexts, device=device)
    given = {
        "tree_ids": torch.zeros(contexts * tokens, dtype=torch.int64, device=device),
        "tree_lengths": Mirrored.of([tokens] * contexts, device),
        "tree_targets": torch.where(columns < tokens // 2, TAIL, rows[:, None]).flatten(),
        "tree_positions": columns.repeat(contexts),
        "row_ids": rows,
        "context_keys": rows,
    }
    return PromptBatch(**{field.name: given.get(field.name, empty) for field in fields(PromptBatch)})


def time_pass(decoder: PackedDecoder, masks: DropoutMasks | None, batch: PromptBatch, key: int) -> float:
    """Return the seconds of a forward and a backward pass."""
    weight = next(decoder.module.parameters())
    embeds = torch.ones(len(batch.tree_ids), decoder.config.hidden_size, dtype=weight.dtype, device=weight.device)
    if weight.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    if masks is not None:
        masks.draw(batch, key)
    hidden = run_tree(decoder, embeds, batch.tree_targets, batch.tree_positions, batch.tree_lengths)
    hidden.float().square().mean().backward()
    if weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
