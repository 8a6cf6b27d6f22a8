"""DeepSpeed config: derived from the experiment's, with the user's extra keys merged last."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from collm_dist.errors import ConfigError

# DeepSpeed keys that settings of this project determine.
OWNED_KEYS: dict[str, str] = {
    "train_batch_size": "stage1.global_batch_size / stage2.global_batch_size",
    "train_micro_batch_size_per_gpu": "stage1.max_tokens_per_micro_batch / stage2.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "stage1.max_tokens_per_micro_batch / stage2.max_tokens_per_micro_batch",
    "gradient_clipping": "stage1.max_grad_norm / stage2.max_grad_norm",
    "optimizer": "stage1.learning_rate, weight_decay, adam_betas (likewise stage2)",
    "scheduler": "stage1.warmup_steps, final_learning_rate_share (likewise stage2)",
    "bf16.enabled": "llm.dtype",
    "fp16": "llm.dtype (float16 is not supported: it overflows)",
    "zero_optimization.stage": "cluster.zero_stage",
}


def build_deepspeed_config(
    *, zero_stage: int, bfloat16: bool, max_grad_norm: float, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config for ``deepspeed.initialize``.

    Args:
        zero_stage: 0 to 3.
        bfloat16: whether the model computes in bfloat16.
        max_grad_norm: gradient clipping; 0 = off.
        extra: ``cluster.deepspeed_extra``, merged last.

    Raises:
        ConfigError: ``extra`` sets an owned key.
    """
    base: dict[str, Any] = {
        # The loop batches rows itself and normalises the loss by their count. DeepSpeed sees one micro-batch per step,
        # so it does not rescale.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Explicit, because DeepSpeed's default is 1.0.
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": bfloat16},
        # DeepSpeed's stage 0 in bfloat16 accumulates gradients in bfloat16, makes an empty first step, and does not
        # expose its float32 weights, so checkpoints could not be exact. Stage 1 differs only in that optimizer state is
        # partitioned.
        "zero_optimization": {"stage": max(zero_stage, 1) if bfloat16 else zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    refuse_owned_keys(extra)
    return _merge(base, extra)


def check_extra(extra: Mapping[str, Any], zero_stage: int) -> None:
    """Check the user's extra keys before any work.

    Raises:
        ConfigError: a key is owned, or DeepSpeed does not know it or refuses its value.
    """
    if not extra:
        return
    config = build_deepspeed_config(zero_stage=zero_stage, bfloat16=False, max_grad_norm=1.0, extra=extra)
    from collm_dist.tuning.engine import find_unknown_settings  # late: DeepSpeed takes seconds to import

    mistakes = []
    for name, known in find_unknown_settings(config):
        matches = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
        hint = f"did you mean '{matches[0]}'?" if matches else f"it knows {', '.join(sorted(known))}"
        mistakes.append(f"cluster.deepspeed_extra: DeepSpeed does not know '{name}'; {hint}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def refuse_owned_keys(extra: Mapping[str, Any]) -> None:
    """Refuse owned keys among the user's extra keys.

    Raises:
        ConfigError: an owned key is set; the message names the setting to use instead.
    """
    mistakes = []
    for key, setting in OWNED_KEYS.items():
        value: Any = extra
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        # Configs written for other trainers use "auto", which leaves the decision to this project.
        if value is not None and value != "auto":
            mistakes.append(f"cluster.deepspeed_extra: '{key}' is determined by {setting}; set that instead")
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
