"""The protocol of a tuning stage, and access to the two stages by name (CoLLM, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from collm_dist.config import Config, LoraConfig, StageConfig
from collm_dist.phases import show_phase
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.tuning.loaded_stage import LoadedStage
from collm_dist.tuning.stage1 import Stage1
from collm_dist.tuning.stage2 import Stage2


class Stage(Protocol):
    """One tuning stage of an experiment: what it builds, starts from, trains, writes and loads."""

    @property
    def name(self) -> StageName:
        """The step's name, and that of its config section."""
        ...

    @property
    def settings(self) -> StageConfig:
        """The config section."""
        ...

    @property
    def is_enabled(self) -> bool:
        """Whether the experiment has this stage."""
        ...

    @property
    def lora(self) -> LoraConfig | None:
        """What trains in the backbone; None = it is frozen."""
        ...

    @property
    def has_slots(self) -> bool:
        """Whether the prompts have slots, and the mapping trains."""
        ...

    @property
    def mask_probability(self) -> float:
        """Share of slots whose vector is hidden in training."""
        ...

    def build(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Build the untrained model.

        Raises:
            ConfigError: the prompt, the answers or the backbone do not fit.
            ArtifactError: an earlier step is not done.
        """
        ...

    def warm_start(self, loaded: LoadedStage) -> None:
        """Load what the previous run (``dataset.extend_from``) trained, as the start of training.

        Raises:
            ArtifactError: the previous run's file is damaged.
        """
        ...

    def take_over(self, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> bool:
        """Link the previous run's finished stage instead of training, if the config allows it. Collective.

        Args:
            run_dir: the run; its data step is done.
            fingerprint: of the stage.

        Returns:
            Whether the stage is done now.

        Raises:
            ArtifactError: a record of the previous run is damaged.
        """
        ...

    def save_product(self, run_dir: RunDir, loaded: LoadedStage, weights: dict[str, Tensor]) -> Path:
        """Write the finished stage's product.

        Args:
            run_dir: the run.
            loaded: the trained model.
            weights: full trained weights of the best step, on the CPU, by parameter name.

        Returns:
            The file whose hash identifies the product.

        Raises:
            DiskError: a file cannot be written.
        """
        ...

    def load(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Load the finished model.

        Raises:
            ArtifactError: the product is missing or damaged.
        """
        ...


def get_stage(config: Config, name: StageName) -> Stage:
    """Return an experiment's stage by name."""
    return Stage1(config) if name == "stage1" else Stage2(config)


def load_stage_model(config: Config, run_dir: RunDir, name: StageName, device: torch.device) -> LoadedStage:
    """Load a finished stage's model for scoring: in evaluation mode, without gradients.

    Raises:
        ArtifactError: the stage is not done, or its product is damaged.
    """
    run_dir.read_record(name)
    with show_phase(f"{name}: loading the model"):
        loaded = get_stage(config, name).load(run_dir, device)
    loaded.model.eval().requires_grad_(False)
    return loaded
