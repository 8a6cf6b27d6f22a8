"""Stage 1: LoRA, or all weights of the layers, on text-only prompts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from collm_dist.config import Config, LoraConfig, StageConfig
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.distributed import get_rank, run_on_rank_0
from collm_dist.llm.anchored_score import FULL_GAIN_RATE, GAIN_RATE, load_anchored_score, save_anchored_score
from collm_dist.llm.lora import make_trainable, merge_adapter, save_adapter
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import sync_files
from collm_dist.runs.file_hashes import check_files
from collm_dist.runs.fingerprints import find_changes
from collm_dist.runs.previous_run import find_previous
from collm_dist.runs.run_dir import RunDir, StageName
from collm_dist.tuning.loaded_stage import (
    LoadedStage,
    assemble_stage,
    build_stage_collator,
    load_llm,
    resolve_answers,
)

DAY_SECONDS = 86_400
# These differ between two nightly runs although nothing about the training of stage 1 does.
_NIGHTLY_KEYS = frozenset({"upstream.data", "upstream.cf", "config.stage1.refresh_every_days"})
_ANCHORED_SCORE = "anchored_score.safetensors"


@dataclass(frozen=True)
class Stage1:
    """LoRA trains on text-only prompts. The product is an adapter, and the backbone with the adapter merged.

    With ``lora.rank: full`` all weights of the decoder layers train, and the product is the tuned backbone alone.
    """

    config: Config
    name: ClassVar[StageName] = "stage1"
    has_slots: ClassVar[bool] = False
    mask_probability: ClassVar[float] = 0.0

    @property
    def settings(self) -> StageConfig:
        """The config section."""
        return self.config.stage1

    @property
    def is_enabled(self) -> bool:
        """Whether the experiment has this stage."""
        return self.config.stage1.enabled

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter that trains, or rank ``full``."""
        return self.config.lora

    def build(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Build the published backbone, with a fresh adapter unless its layers train; see ``Stage.build``."""
        backbone = load_llm(self.config.llm)
        answer_ids = resolve_answers(self.config, backbone)
        collator = build_stage_collator(self.config, run_dir, backbone.tokenizer, self.name)
        lora = self.config.lora
        adapter = make_trainable(backbone.model, **lora.model_dump(), seed=self.config.run.seed)
        rate = GAIN_RATE if lora.rank != "full" else FULL_GAIN_RATE
        return assemble_stage(self.config, device, backbone, answer_ids, collator, adapter=adapter, gain_rate=rate)

    def warm_start(self, loaded: LoadedStage) -> None:
        """Start from the published backbone: stage 1 is taken over whole or trained from the beginning."""

    def take_over(self, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> bool:
        """Link the previous run's stage 1 while ``stage1.refresh_every_days`` have not passed; see ``Stage``."""
        previous = find_previous(self.config)
        if previous is None or not self._is_fresh(previous, run_dir, fingerprint):
            return False
        anchored = () if self.config.anchor.kind is None else (_ANCHORED_SCORE,)
        run_on_rank_0(lambda: _link_products((*self._folders, *anchored), previous, run_dir, fingerprint))
        if get_rank() == 0:
            origin = run_dir.read_record(self.name)["taken_from"]
            print(f"stage1: taken from {origin}, until stage1.refresh_every_days have passed", flush=True)
        return True

    def _is_fresh(self, previous: RunDir, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> bool:
        """Return whether the previous run trained the same stage 1, on data that reach almost as far."""
        days = self.config.stage1.refresh_every_days
        if days is None or not previous.is_done(self.name):
            return False
        record = previous.read_record(self.name)
        recorded, current = (
            {key: value for key, value in keys.items() if key not in _NIGHTLY_KEYS}
            for keys in (record["fingerprint"], fingerprint)
        )
        if find_changes(recorded, current):
            return False
        newest = load_manifest(run_dir.step_dir("data")).splits["train"].last_timestamp
        return bool((newest - record["trained_until"]) / DAY_SECONDS < days)

    def save_product(self, run_dir: RunDir, loaded: LoadedStage, weights: dict[str, Tensor]) -> Path:
        """Write ``adapter/`` (PEFT format) and ``merged/``, each with the tokenizer; see ``Stage.save_product``.

        With ``lora.rank: full`` it writes ``merged/`` alone.
        """
        folder, tokenizer, source = run_dir.step_dir(self.name), loaded.backbone.tokenizer, loaded.backbone.source
        prefix = "backbone."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if loaded.model.anchored_score is not None:
            save_anchored_score(folder / _ANCHORED_SCORE, weights, loaded.model.anchored_score.rate)
        adapter, merged = folder / "adapter", folder / "merged"
        if loaded.adapter is not None:
            save_adapter(loaded.adapter, adapter, state, source.public_name, source.revision)
        # Merged from the files, on the CPU: the trained model may be partitioned or quantized.
        with show_phase("stage1: merging what was trained into the backbone"):
            plain = load_llm(self.config.llm, may_quantize=False).model
            if loaded.adapter is None:
                plain.load_state_dict(state, strict=False)  # embeddings and head stay as published
            else:
                plain = merge_adapter(plain, adapter)
            plain.save_pretrained(str(merged))
        for product in self._folders:
            tokenizer.save_pretrained(str(folder / product))
            sync_files(folder / product)
        return min((folder / self._folders[0]).glob("*.safetensors"))

    @property
    def _folders(self) -> tuple[str, ...]:
        """Folders of the product; the first one's weights identify it."""
        return ("merged",) if self.config.lora.rank == "full" else ("adapter", "merged")

    def load(self, run_dir: RunDir, device: torch.device) -> LoadedStage:
        """Load the merged backbone; see ``Stage.load``."""
        run_on_rank_0(lambda: check_files(run_dir, "stage1", "merged/", _ANCHORED_SCORE))
        backbone = load_llm(self.config.llm, run_dir.step_dir(self.name) / "merged")
        answer_ids = resolve_answers(self.config, backbone)
        collator = build_stage_collator(self.config, run_dir, backbone.tokenizer, self.name)
        loaded = assemble_stage(self.config, device, backbone, answer_ids, collator)
        if loaded.model.anchored_score is not None:
            load_anchored_score(loaded.model.anchored_score, run_dir.step_dir(self.name) / _ANCHORED_SCORE)
        return loaded


def _link_products(products: Sequence[str], previous: RunDir, run_dir: RunDir, fingerprint: Mapping[str, Any]) -> None:
    """Link the previous run's products, then write a record that names their origin."""
    check_files(previous, "stage1")
    folder, origin = run_dir.step_dir("stage1"), previous.step_dir("stage1").resolve()
    run_dir.withdraw("stage1")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for product in products:
        source = (origin / product).resolve()
        (folder / product).symlink_to(os.path.relpath(source, folder.resolve()))
    record = previous.read_record("stage1") | {"fingerprint": dict(fingerprint)}
    record["taken_from"] = record.get("taken_from") or str(origin.parent)
    run_dir.write_record("stage1", record)
