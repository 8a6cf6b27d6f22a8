"""How fast is the loader? Samples a second on one core: from shards to global batches, and on to model-ready tensors.

    python -m benchmarks.loader [--run-dir RUN] [--rows 300000] [--out benchmarks/results/loader_cpu.json]

Without a run directory, shards are generated: contexts with up to 50 liked items and 1.8 targets on average.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.lib.machine import describe_hardware
from collm_dist.data.prompts.item_tokens import load_item_tokens
from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.template import PromptTemplate, load_prompt_text
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from collm_dist.data.shards.global_order import GlobalOrder
from collm_dist.data.shards.interactions import load_item_table
from collm_dist.data.shards.manifest import Manifest, load_manifest
from collm_dist.data.shards.shard_writer import write_shard
from collm_dist.runs.atomic_files import write_json

NUM_ITEMS, NUM_SHARDS, MAX_HISTORY = 3000, 8, 50
HISTORY_SHOWN, MAX_TOKENS = 10, 8192


def generate_block(num_rows: int, seed: int) -> ContextBlock:
    """Return random contexts with about ``num_rows`` targets."""
    rng = np.random.default_rng(seed)
    targets = rng.geometric(0.55, int(num_rows * 0.55))
    history = rng.integers(0, MAX_HISTORY + 1, len(targets))
    count = int(targets.sum())
    dislikes = rng.integers(0, 11, count)
    flat = {name: rng.integers(0, 2, count) for name in TARGET_FIELDS}
    flat |= {name: seed * 10**7 + np.arange(count) for name in ("row_id", "group_id")}
    flat |= {"item_idx": rng.integers(0, NUM_ITEMS, count), "user_rows": flat["user_likes"] + 1}
    flat |= {"item_rows": flat["item_likes"] + 1}
    return ContextBlock(
        user_idx=rng.integers(0, 10**6, len(targets)),
        num_likes=rng.integers(0, 10**3, len(targets)),
        history_offsets=np.concatenate([[0], np.cumsum(history)]),
        history_items=rng.integers(0, NUM_ITEMS, history.sum()),
        target_offsets=np.concatenate([[0], np.cumsum(targets)]),
        dislike_offsets=np.concatenate([[0], np.cumsum(dislikes)]),
        dislike_items=rng.integers(0, NUM_ITEMS, dislikes.sum()),
        **flat,
    )


def generate_data(data_dir: Path, num_rows: int) -> tuple[Manifest, list[str]]:
    """Write shards and return their manifest and item texts."""
    shards = tuple(
        write_shard(data_dir, f"train-{number:05d}.tar", "train", generate_block(num_rows // NUM_SHARDS, number), 256)
        for number in range(NUM_SHARDS)
    )
    manifest = Manifest(1, NUM_ITEMS, "", "", "strict", "explicit", MAX_HISTORY, {}, shards, (), {}, "")
    return manifest, [f"The long way home, part {number} (19{number % 100:02d})" for number in range(NUM_ITEMS)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts; prompts come out about as long as a real backbone's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")  # noqa: S106


def build_collator(folder: Path, texts: list[str], prompt: str) -> PromptCollator:
    """Return the collator of a stage-2 prompt."""
    tokenizer = make_tokenizer([*texts, load_prompt_text(prompt)])
    return PromptCollator(
        PromptTemplate.parse(load_prompt_text(prompt), allow_slots=True),
        load_item_tokens(folder, texts, tokenizer, 24),
        tokenizer,
        history_length=HISTORY_SHOWN,
        cf_history_length=MAX_HISTORY,
        max_prompt_tokens=512,
        empty_history_text="(nothing yet)",
        tokens_per_slot=1,
        user_depends_on_target=False,
    )


def measure(batches: Iterator[ContextBlock], collator: PromptCollator | None, seconds: float) -> dict[str, Any]:
    """Iterate for a time; CPU seconds of all threads, so that the reader thread is paid for."""
    rows = tokens = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for block in batches:
        rows += block.num_targets
        if collator is not None:
            counts = collator.count_tokens(block)
            for piece in plan_micro_batches(block, counts, 0, 1, MAX_TOKENS):
                batch = collator.collate(piece, block)
                tokens += batch.num_tokens
        if time.perf_counter() - wall > seconds:
            break
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rates = {"rows": rows, "samples_per_cpu_second": round(rows / cpu), "samples_per_second": round(rows / wall)}
    return rates | ({"padded_tokens_per_row": round(tokens / rows, 1)} if collator else {})


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="measure on this run's data instead of generated data")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--prompt", default="configs/prompts/stage2_pair.txt")
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time of one measurement")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_cpu.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = arguments.run_dir / "data" if arguments.run_dir else Path(folder)
        if arguments.run_dir:
            manifest, texts = load_manifest(data_dir), load_item_table(data_dir)["text"]
        else:
            manifest, texts = generate_data(data_dir, arguments.rows)
        collator = build_collator(Path(folder), texts, arguments.prompt)
        results: dict[str, Any] = {}
        for size in (32, 256, 4096):
            order = GlobalOrder(data_dir, manifest, "train", 0, size)
            results[f"global_batch_size_{size}"] = {
                "shards_to_batches": measure(order.iter_batches(0), None, arguments.seconds),
                "shards_to_tensors": measure(order.iter_batches(1), collator, arguments.seconds),
            }
    config = {"data": "run" if arguments.run_dir else "generated", "rows": order.num_rows}
    config |= {"contexts": order.num_contexts, "prompt": arguments.prompt, "history_length": HISTORY_SHOWN}
    config |= {"max_tokens_per_micro_batch": MAX_TOKENS, "shards": len(manifest.list_shards("train"))}
    record = {
        "benchmark": "loader",
        "config": config,
        "hardware": describe_hardware(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "webdataset", "safetensors")},
        },
        "results": results,
    }
    write_json(arguments.out, record)
    for name, result in results.items():
        print(name, result)


if __name__ == "__main__":
    main()
