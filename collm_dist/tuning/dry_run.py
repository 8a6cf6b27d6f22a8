"""``--dry-run`` of the tuning stages: steps, FLOPs, memory, and what fits which GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm_dist.assets import resolve_backbone
from collm_dist.cf.models.registry import get_model_class, list_arguments
from collm_dist.config import Config
from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import PromptCollator
from collm_dist.data.prompts.stage_prompts import build_collator
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.data.samples.pair_features import PAIR_FEATURES
from collm_dist.data.shards.context_block import ContextBlock
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.llm.backbone import load_tokenizer, resolve_dtype
from collm_dist.llm.title_likelihood import count_logit_bytes
from collm_dist.prompt_batch import PromptBatch
from collm_dist.runs.run_dir import STAGES, RunDir
from collm_dist.tuning.cpu_rate import estimate_seconds, format_duration, measure_matmul_rate
from collm_dist.tuning.flops import DecoderShape, StepCost, count_padded, count_shared
from collm_dist.tuning.loop import count_total_steps
from collm_dist.tuning.losses import LossWeights
from collm_dist.tuning.memory_plan import (
    LayerMemory,
    LoraSettings,
    count_weight_bytes,
    find_fitting_tokens,
    measure_layers,
    plan_memory,
)
from collm_dist.tuning.run_stage import build_orders
from collm_dist.tuning.stage import Stage, get_stage

SAMPLED_BATCHES = 8
# The result of `auto` is known only on the GPU; memory is shown for this many tokens.
ASSUMED_TOKENS = 8192
SHOWN_GPUS_GB = (24.0, 80.0)
# bfloat16 throughput of a GPU in a well-filled step.
ASSUMED_TFLOPS = 150.0


@dataclass(frozen=True)
class _Sample:
    """Measurements of some global batches.

    Attributes:
        shared, padded: cost with shared contexts, and of padded rows with logits at every position.
        contexts: number of contexts.
        prefix_tokens: tokens of all prefixes.
        largest: the largest micro-batch.
    """

    shared: StepCost
    padded: StepCost
    contexts: int
    prefix_tokens: int
    largest: PromptBatch


def describe_stage_plan(config: Config, run_dir: RunDir) -> list[str]:
    """Return the lines of the plan; only the data step must be done.

    Raises:
        ConfigError, DataError: the prompt or the backbone does not fit, or cannot be found.
    """
    if not run_dir.is_done("data"):
        return ["steps, FLOPs and memory: known once the data step is done"]
    source = resolve_backbone(config.llm.backbone, config.llm.revision)
    backbone_config = AutoConfig.from_pretrained(
        source.location, revision=source.revision, trust_remote_code=config.llm.trust_remote_code
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(backbone_config, trust_remote_code=config.llm.trust_remote_code)
    tokenizer = load_tokenizer(config.llm.backbone, config.llm.revision, trust_remote_code=config.llm.trust_remote_code)
    lines: list[str] = []
    rate = None
    if not torch.cuda.is_available():
        rate = measure_matmul_rate(skeleton.config.get_text_config().hidden_size, resolve_dtype(config.llm.dtype))
    for stage in (get_stage(config, name) for name in STAGES):
        if stage.is_enabled:
            lines += _describe_stage(config, run_dir, stage, skeleton, tokenizer, rate)
    return lines


def _describe_stage(
    config: Config, run_dir: RunDir, stage: Stage, skeleton: Any, tokenizer: Any, cpu_rate: float | None
) -> list[str]:
    """Return a stage's lines; ``cpu_rate`` is the FLOP/s of a matmul on this CPU, None on a machine with a GPU."""
    name, settings = stage.name, stage.settings
    train, valid = build_orders(config, run_dir, settings)
    steps = count_total_steps(settings, train)
    collator = build_collator(config, run_dir, tokenizer, name)
    trains_layers = stage.lora is not None and stage.lora.rank == "full"
    shape = dataclasses.replace(DecoderShape.from_model(skeleton), trains_layers=trains_layers)
    dtype = _choose_dtype(config)
    tokens = settings.max_tokens_per_micro_batch
    budget = ASSUMED_TOKENS if tokens == "auto" else tokens
    blocks = list(islice(train.iter_batches(), SAMPLED_BATCHES))
    keep_groups = LossWeights.of(settings, scores_titles=collator.scores_titles).keep_groups
    sample = _measure_sample(collator, shape, blocks, budget, keep_groups)
    lora = None if stage.lora is None else LoraSettings(**stage.lora.model_dump())
    trusts = config.llm.trust_remote_code
    layers = measure_layers(skeleton.config, dtype, config.llm.attention, lora, trust_remote_code=trusts)
    flops = sample.shared.flops / len(blocks)
    minutes = steps * flops / (ASSUMED_TFLOPS * 1e12) / 60
    lines = [
        f"{name}: {steps:,} steps of {settings.global_batch_size} rows at most ({train.num_rows:,} rows in "
        f"{train.num_contexts:,} contexts an epoch), validation on {valid.num_rows:,} rows",
        f"{name}: {flops / 1e12:.2f} TFLOP and {sample.shared.tokens / len(blocks):,.0f} tokens per step; padded rows "
        f"with all logits would take {sample.padded.flops / sample.shared.flops:.1f} times the FLOPs. "
        f"{minutes:,.1f} GPU minutes at {ASSUMED_TFLOPS:.0f} TFLOP/s, validation not counted",
    ]
    if cpu_rate is not None:
        duration = format_duration(estimate_seconds(steps * flops, cpu_rate))
        lines.append(
            f"{name}: about {duration} on this CPU, an estimate from a matmul at {cpu_rate / 1e9:,.0f} GFLOP/s on "
            f"{torch.get_num_threads()} threads; validation not counted"
        )
    lines += _describe_memory(config, run_dir, stage, skeleton, shape, layers, sample, dtype)
    if stage.has_slots:
        size = 2 * shape.num_layers * shape.key_width * dtype.itemsize * sample.prefix_tokens / sample.contexts
        lines.append(
            f"{name}: context_cache=memory would hold an epoch in {size * train.num_contexts / 2**30:.1f} GiB of host "
            "memory; worthwhile if that fits and several epochs run"
        )
    return lines


def _choose_dtype(config: Config) -> torch.dtype:
    """Return the dtype on a GPU, which the plan is for."""
    return torch.bfloat16 if config.llm.dtype == "auto" else resolve_dtype(config.llm.dtype)


def _measure_sample(
    collator: PromptCollator, shape: DecoderShape, blocks: list[ContextBlock], budget: int, keep_groups: bool
) -> _Sample:
    shared = padded = StepCost(0, 0, 0)
    contexts = prefix_tokens = 0
    pieces: list[PromptBatch] = []
    for block in map(collator.cut_contexts, blocks):
        batch = collator.collate(block, block)
        counts = collator.count_tokens(block)
        lengths = (counts.header + counts.prefix + counts.tail)[block.target_contexts] + counts.branch
        shared += count_shared(shape, batch, training=True)
        padded += count_padded(shape, block.num_targets, int(lengths.max()), training=True, full_head=True)
        contexts += block.num_contexts
        prefix_tokens += int(counts.prefix.sum())
        groups = find_groups(block) if keep_groups else None
        planned = plan_micro_batches(block, counts, 0, 1, budget, groups)
        pieces += [collator.collate(piece, block) for piece in planned]
    largest = max(pieces, key=lambda batch: (len(batch.tree_ids), len(batch.prefix_ids)))
    return _Sample(shared, padded, contexts, prefix_tokens, largest)


def _count_keys(batch: PromptBatch) -> int:
    """Return the number of keys that attention lays out on a GPU."""
    segments, header = batch.tree_segments, len(batch.header_ids)
    context_lengths = header + batch.prefix_lengths.numbers[batch.prefix_rows.numbers]
    num_keys = context_lengths[segments.rows.numbers] + segments.tails.numbers + segments.lengths.numbers
    return int(num_keys.sum())


def _count_tuned_cf(config: Config, run_dir: RunDir) -> int:
    """Return an upper bound of the CF model's parameters that stage 2 trains."""
    if not config.stage2.train_cf:
        return 0
    manifest = load_manifest(run_dir.step_dir("data"))
    arguments = list_arguments(config.cf, manifest.max_history_length, config.run.seed)
    with torch.device("meta"):
        model = get_model_class(config.cf.model)(manifest.num_users, manifest.num_items, **arguments)
    return sum(param.numel() for param in model.parameters())


def _describe_memory(
    config: Config,
    run_dir: RunDir,
    stage: Stage,
    skeleton: Any,
    shape: DecoderShape,
    layers: LayerMemory,
    sample: _Sample,
    dtype: torch.dtype,
) -> list[str]:
    name = stage.name
    width = config.cf.embedding_dim + 1
    cf_hidden = config.mapping.hidden_multiple * width
    pair_hidden = config.mapping.hidden_multiple * len(PAIR_FEATURES)
    out = config.mapping.tokens_per_slot * shape.hidden_size
    slot_parameters = (cf_hidden + pair_hidden) * out + cf_hidden * width + _count_tuned_cf(config, run_dir)
    arguments: dict[str, Any] = {
        "weights": count_weight_bytes(skeleton, dtype, config.llm.quantization),
        "other_trainable": slot_parameters if stage.has_slots else 0,
        "tree_tokens": len(sample.largest.tree_ids) + len(sample.largest.title_places),
        "prefix_tokens": len(sample.largest.prefix_ids),
        "keys": _count_keys(sample.largest),
        "element_size": dtype.itemsize,
        "checkpointing": config.llm.activation_checkpointing,
        "logits": count_logit_bytes(shape.vocabulary) if config.prompt.score == "title" else 0,
    }
    plan = plan_memory(shape, layers, **arguments)
    remedies: dict[str, dict[str, Any]] = {}
    if not config.llm.activation_checkpointing:
        remedies["llm.activation_checkpointing=true"] = {"checkpointing": True}
    if config.llm.quantization == "none" and config.lora.rank != "full":
        remedies["llm.quantization=4bit"] = {"weights": count_weight_bytes(skeleton, dtype, "4bit")}
    tokens = len(sample.largest.tree_ids) + len(sample.largest.prefix_ids)
    gigabytes = [
        f"{value / 1e9:.2f}" for value in (plan.weights, plan.state, plan.activations, plan.working, plan.peak)
    ]
    lines = [
        f"{name}: memory in {str(dtype).removeprefix('torch.')} with micro-batches of up to {tokens:,} tokens: weights "
        f"{gigabytes[0]} + training state {gigabytes[1]} + activations {gigabytes[2]} + working {gigabytes[3]} = "
        f"{gigabytes[4]} GB per process"
    ]
    for gpu in SHOWN_GPUS_GB:
        fitting = find_fitting_tokens(plan, tokens, gpu * 1e9)
        if fitting >= tokens:
            lines.append(f"{name}: fits a GPU of {gpu:.0f} GB, up to {fitting:,} tokens in a micro-batch")
            continue
        advice = []
        if fitting >= config.prompt.max_prompt_tokens:
            advice.append(f"max_tokens_per_micro_batch={fitting}")
        for setting, changes in remedies.items():
            fitting = find_fitting_tokens(plan_memory(shape, layers, **{**arguments, **changes}), tokens, gpu * 1e9)
            if fitting >= config.prompt.max_prompt_tokens:
                advice.append(f"{setting} with up to {fitting:,} tokens")
        if shape.trains_layers:
            advice.append("cluster.zero_stage=2 on several GPUs, which share the training state, or lora.rank=16")
        if not advice:
            advice.append("cluster.zero_stage=3 on several GPUs, which share the weights")
        lines.append(f"{name}: does not fit a GPU of {gpu:.0f} GB; it does with {', or '.join(advice)}")
    return lines
