"""The DeepSpeed configuration: derived from ours, with the user's extra keys merged last."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from collm_dist.errors import ConfigError

# Keys that this project decides, with the setting that decides them.
OWNED_KEYS: dict[str, str] = {
    "train_batch_size": "stage1.global_batch_size / stage2.global_batch_size",
    "train_micro_batch_size_per_gpu": "stage1.max_tokens_per_micro_batch / stage2.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "stage1.max_tokens_per_micro_batch / stage2.max_tokens_per_micro_batch",
    "gradient_clipping": "stage1.max_grad_norm / stage2.max_grad_norm",
    "optimizer": "stage1.learning_rate, weight_decay, adam_betas (likewise stage2)",
    "scheduler": "stage1.warmup_steps, final_learning_rate_share (likewise stage2)",
    "bf16.enabled": "llm.dtype",
    "fp16": "llm.dtype (float16 is not offered: it overflows)",
    "zero_optimization.stage": "cluster.zero_stage",
}


def build_deepspeed_config(
    *, zero_stage: int, bfloat16: bool, max_grad_norm: float, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    Args:
        zero_stage: 0 to 3.
        bfloat16: whether the model computes in bfloat16.
        max_grad_norm: 0 = no clipping.
        extra: merged last.

    Raises:
        ConfigError: ``extra`` sets a key that this project decides.
    """
    base: dict[str, Any] = {
        # Batches are ours: rows of any number make up a step, and the loss is normalised by their count. One
        # "micro-batch" a step as far as DeepSpeed knows, so that it rescales nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Always explicit: DeepSpeed's own default is 1.0.
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bfloat16},
        # DeepSpeed's own stage 0 in bfloat16 adds gradients up in bfloat16, makes a step with none at the start, and
        # tells nobody its float32 weights, so a checkpoint could not be exact. Stage 1 differs only in that each
        # process keeps a share of the optimizer's state.
        "zero_optimization": {"stage": max(zero_stage, 1) if bfloat16 else zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    refuse_owned_keys(extra)
    return _merge(base, extra)


def refuse_owned_keys(extra: Mapping[str, Any]) -> None:
    """Check the user's extra keys.

    Raises:
        ConfigError: one of them is ours; the message names the setting to use.
    """
    mistakes = []
    for key, setting in OWNED_KEYS.items():
        value: Any = extra
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # "auto" is what configurations made for other trainers say: it leaves the decision to us.
        if value is not None and value != "auto":
            mistakes.append(f"cluster.deepspeed_extra: '{key}' is decided by {setting}; set that instead")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in extra.items():
        if value == "auto":
            continue
        are_sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if are_sections else copy.deepcopy(value)
    return merged
