"""DeepSpeed: process group, wrapped model, and its training state as full tensors. No other file imports it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from collm_dist.distributed import get_rank, get_world_size
from collm_dist.errors import ConfigError

# Read by ``deepspeed.initialize`` itself.
_OTHER_KEYS = {"sequence_parallel_size", "data_parallel_size"}
MOMENTS = ("exp_avg", "exp_avg_sq")


def init_distributed(timeout_minutes: float) -> torch.device:
    """Join the process group and return this process's device.

    The deepspeed launcher, torchrun and Ray Train set the environment; under plain ``python`` it is set here.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Otherwise DeepSpeed compiles a shared-memory all-reduce for CPUs on first use, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that newer PyTorch deprecates; the user cannot act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Uses an existing group, such as that of Ray Train.
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes), verbose=False
    )
    return device


class _ReadSettings(dict[str, Any]):
    """Settings that note which keys are looked up, and whether they are read as a whole, which pydantic then checks."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        nested = {key: _ReadSettings(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
        super().__init__(nested)
        self.looked_up: set[str] = set()
        self.is_whole = False

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.looked_up.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        self.is_whole = True
        return super().__iter__()

    def keys(self) -> Any:
        return self  # "key in settings.keys()" is a look-up

    def find_unread(self, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
        """Yield the dotted names of keys that were not read, each with the keys that were looked up beside it."""
        for key, value in dict.items(self):
            if self.is_whole or key in self.looked_up:
                if isinstance(value, _ReadSettings) and value.looked_up:
                    yield from value.find_unread(f"{prefix}{key}.")
            else:
                yield prefix + key, self.looked_up


def find_unknown_settings(config: Mapping[str, Any]) -> list[tuple[str, set[str]]]:
    """Return the settings that this DeepSpeed does not read, as dotted names, each with the names that it knows there.

    Raises:
        ConfigError: DeepSpeed refuses a value; the message is its own.
    """
    settings = _ReadSettings(config)
    settings.looked_up |= _OTHER_KEYS
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        kinds = {kind.__name__: kind for kind in DeepSpeedConfigModel.__subclasses__()}
        known = set(kinds[error.title].model_fields) if error.title in kinds else set()
        mistakes = [(".".join(map(str, mistake["loc"])), mistake) for mistake in error.errors()]
        if wrong := [f"{name}: {mistake['msg']}" for name, mistake in mistakes if mistake["type"] != "extra_forbidden"]:
            raise ConfigError("cluster.deepspeed_extra: " + "; ".join(wrong)) from None
        return [(name, known) for name, _ in mistakes]
    except (AssertionError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        raise ConfigError(f"cluster.deepspeed_extra: DeepSpeed refuses it: {error}") from None
    return list(settings.find_unread())


@dataclass
class TrainingState:
    """Tensors of the training state, unpartitioned and on the CPU, independent of the ZeRO stage.

    Attributes:
        weights: float32 trainable weights by parameter name.
        moments: Adam's moments by ``exp_avg.<name>`` and ``exp_avg_sq.<name>``; empty before the first step.
        adam_steps: number of updates.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    adam_steps: int = 0


class TuningEngine:
    """A model under DeepSpeed, with AdamW over its trainable parameters."""

    def __init__(
        self,
        model: nn.Module,
        *,
        deepspeed_config: Mapping[str, Any],
        device: torch.device,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        state: TrainingState | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: parameters that require gradients train.
            deepspeed_config: see ``build_deepspeed_config``.
            device: this process's device.
            learning_rate, weight_decay, betas: of AdamW.
            state: state to resume from.
        """
        self._named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        if state is not None:
            with torch.no_grad():
                for name, parameter in self._named:
                    parameter.copy_(state.weights[name])
        self.device = device
        self._clip = float(deepspeed_config["gradient_clipping"])
        self._zero_stage = int(deepspeed_config["zero_optimization"]["stage"])
        optimizer = torch.optim.AdamW(
            [param for _, param in self._named],
            lr=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=dict(deepspeed_config), dist_init_required=False
        )
        if self._zero_stage in (1, 2):
            # In bfloat16 these check every gradient separately, with ten kernels each, and then the global norm, which
            # is equivalent and the only check in float32.
            self._optimizer.check_overflow = lambda **_: None
        self._norms: list[Tensor] = []
        for _, parameter in self._named:
            parameter.register_hook(self._note_norm)  # type: ignore[no-untyped-call]
        if state is not None and state.adam_steps:
            self._load_optimizer(state)

    @property
    def module(self) -> nn.Module:
        """The wrapped model."""
        return self._engine  # type: ignore[no-any-return]

    def set_training(self, training: bool) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(training)

    def __call__(self, *args: Any) -> Any:
        """Run the model's forward pass."""
        return self._engine(*args)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate a micro-batch's gradients. ``is_last`` ends the step's accumulation.

        A non-finite loss makes all gradients non-finite, so a step with them updates nothing.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))

    def take_finite(self) -> Tensor:
        """Return whether all gradients since the last call were finite on this rank, as a bool tensor; no host sync."""
        norms, self._norms = [torch.zeros((), device=self.device), *self._norms], []
        return torch.isfinite(torch.stack(norms)).all()

    def step(self, learning_rate: float) -> Tensor | float | None:
        """Clip, update and clear the gradients.

        Returns:
            The global gradient norm before clipping; None if it is not finite, and then no rank has updated.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._compute_plain_norm() if self._zero_stage == 0 else None
        is_plain = isinstance(
            self._optimizer, torch.optim.Optimizer
        )  # DeepSpeed's optimizers check the norm themselves
        if is_plain and norm is not None and not torch.isfinite(norm):
            self._engine.zero_grad()
            return None
        self._engine.step()
        if not self._engine.was_step_applied():
            return None
        deepspeed_norm = self._engine.get_global_grad_norm()
        if norm is None:
            norm = deepspeed_norm
        return norm if norm is not None else float("nan")

    @contextmanager
    def computing_with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run forward passes with other trainable weights inside the block. Collective.

        The optimizer's own weights stay, and those of the model return to the bit.

        Args:
            weights: full weights by parameter name, the same on all ranks.
        """
        kept: list[Tensor] = []
        with self._full_weights(), torch.no_grad():
            for name, parameter in self._named:
                kept.append(parameter.detach().clone())
                parameter.copy_(weights[name])
        try:
            yield
        finally:
            with self._full_weights(), torch.no_grad():
                for (_, parameter), value in zip(self._named, kept, strict=True):
                    parameter.copy_(value)

    def _full_weights(self) -> AbstractContextManager[Any]:
        """Return a context in which every trainable parameter is whole on every rank, and changes to it are kept."""
        parameters = [parameter for _, parameter in self._named]
        whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0, enabled=self._zero_stage == 3
        )
        return whole

    def export_state(self, *, with_moments: bool = True) -> TrainingState:
        """Gather the full state on every rank. Collective."""
        state = TrainingState(weights={})
        for name, parameter in self._named:
            state.weights[name] = self._get_weight(parameter).detach().float().cpu().clone()
        if with_moments:
            state.adam_steps = self._count_adam_steps()
            for key in MOMENTS if state.adam_steps else ():
                for name, parameter in self._named:
                    state.moments[f"{key}.{name}"] = self._get_moment(parameter, key).detach().float().cpu().clone()
        return state

    def _note_norm(self, gradient: Tensor) -> None:
        # A single kernel. The norm is not finite if any value is not, and, like DeepSpeed's, if squares overflow.
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    def _compute_plain_norm(self) -> Tensor:
        """Return the norm at stage 0 in float32, where DeepSpeed reports none and gradients are already all-reduced."""
        gradients = [param.grad for _, param in self._named if param.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def _get_weight(self, parameter: nn.Parameter) -> Tensor:
        full: Tensor | None = safe_get_full_fp32_param(parameter)
        weight: Tensor = parameter.detach() if full is None else full
        return weight

    def _get_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        full: Tensor | None = safe_get_full_optimizer_state(parameter, key)
        if full is None:
            full = self._inner_optimizer.state[parameter][key]
        assert full is not None
        return full

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside ZeRO's wrapper."""
        return getattr(self._optimizer, "optimizer", self._optimizer)  # type: ignore[no-any-return]

    def _count_adam_steps(self) -> int:
        steps = [int(entry["step"]) for entry in self._inner_optimizer.state.values() if "step" in entry]
        return max(steps, default=0)

    def _load_optimizer(self, state: TrainingState) -> None:
        """Create and fill the optimizer state, which DeepSpeed leaves empty before the first step."""
        inner = self._inner_optimizer
        flats = getattr(self._optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps these outside the groups
        for flat in flats or [param for group in inner.param_groups for param in group["params"]]:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.state[flat] = {"step": torch.tensor(float(state.adam_steps), device=_step_device(flat)), **zeros}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named:
            self._set_full(parameter, state.weights[name].to(self.device), None)
            for key in MOMENTS:
                self._set_full(parameter, state.moments[f"{key}.{name}"].to(self.device), key)

    def _set_full(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set a parameter's float32 weight (key None) or one of its moments from the full tensor."""
        if self._zero_stage == 3:
            # DeepSpeed's setter fails if a parameter's size is not divisible by the world size.
            partition, _ = self._optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            size = partition.numel()
            padded = torch.nn.functional.pad(value.flatten(), (0, size * get_world_size() - value.numel()))
            partition.data.copy_(padded[size * get_rank() : size * (get_rank() + 1)])
        elif safe_get_full_fp32_param(parameter) is not None:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        elif key is not None:  # the weight was set before the model was wrapped
            self._inner_optimizer.state[parameter][key].copy_(value)


def copy_trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights of a model that is not wrapped yet by parameter name, in float32 on the CPU."""
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _step_device(parameter: Tensor) -> torch.device:
    """Return the device of AdamW's step count: the parameter's for fused AdamW, else the CPU."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")
