"""Padded rows, one for each target: the model and batches of the peers, and the CoLLM authors' training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.tuning_workload import TRAINING
from collm_dist.config import Config
from collm_dist.llm.backbone import load_backbone
from collm_dist.llm.lora import add_lora

REFERENCE_ROWS = 16
IGNORED = -100


class PaddedModel(nn.Module):
    """A backbone with soft tokens among its input embeddings, for padded rows."""

    def __init__(self, backbone: Any, config: Config, slot_widths: dict[str, int], *, lora: bool) -> None:
        super().__init__()
        if lora:
            backbone = add_lora(
                backbone,
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                dropout=config.lora.dropout,
                target_modules=config.lora.target_modules,
                seed=0,
            )
        self.backbone = backbone
        llm_dim = backbone.get_input_embeddings().weight.shape[1]
        self.mappings = nn.ModuleDict()
        for kind, size in slot_widths.items():
            name = "pair" if kind == "pair" else "cf"
            if name not in self.mappings:
                hidden = config.mapping.hidden_multiple * size
                self.mappings[name] = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, llm_dim))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        slots: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Return the backbone's output."""
        embeds = self.backbone.get_input_embeddings()(input_ids)
        for kind, (rows, columns, vectors) in (slots or {}).items():
            tokens = self.mappings["pair" if kind == "pair" else "cf"](vectors)
            embeds = embeds.index_put((rows, columns), tokens.to(embeds.dtype))
        return self.backbone(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False, **options
        )


def build_padded_model(config: Config, rows: dict[str, Any], phase: str, device: torch.device) -> PaddedModel:
    """Return the peers' model of a phase, with the published backbone."""
    backbone = load_backbone(config.llm.backbone, dtype=config.llm.dtype, attention=config.llm.attention).model
    widths = {kind: len(vector) for _, kind, vector in rows["batches"][0][0]["slots"]}
    model = PaddedModel(backbone, config, widths, lora=phase == "stage1").to(device)
    touch_weights(model)
    return model.train(phase in TRAINING)


def touch_weights(model: nn.Module) -> None:
    """Bring weights that are mapped from a file into memory; else their first use would count as memory of a step."""
    for parameter in model.parameters():
        parameter.sum()


def pad(rows: list[dict[str, Any]], *, left: bool, answers: list[int] | None, device: torch.device) -> dict[str, Any]:
    """Return a padded batch; with ``answers`` each row ends with its answer, which is the only label."""
    ids_by_row = [row["ids"] + ([answers[1 - row["label"]]] if answers else []) for row in rows]
    width = max(map(len, ids_by_row))
    input_ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    slot_parts: dict[str, tuple[list[int], list[int], list[Any]]] = {}
    for number, ids in enumerate(ids_by_row):
        start = width - len(ids) if left else 0
        input_ids[number, start : start + len(ids)] = torch.tensor(ids)
        mask[number, start : start + len(ids)] = 1
        labels[number, start + len(ids) - 1] = ids[-1]
        for column, kind, vector in rows[number]["slots"]:
            parts = slot_parts.setdefault(kind, ([], [], []))
            for values, value in zip(parts, (number, start + column, vector), strict=True):
                values.append(value)
    slots = {kind: tuple(torch.tensor(values, device=device) for values in parts) for kind, parts in slot_parts.items()}
    batch: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device), "slots": slots}
    return batch | {"labels": labels.to(device)} if answers else batch


class ReferenceStep:
    """The authors' step: rows in their order, 16 at a time, padded to the longest."""

    def __init__(self, model: PaddedModel, rows: dict[str, Any], device: torch.device, *, last: bool) -> None:
        """Prepare to work through batches.

        Args:
            model: in training or evaluation mode.
            rows: as ``write_rows`` wrote them.
            device: of the model.
            last: compute logits at the last position only, instead of at all positions.
        """
        self.model, self.rows, self.device, self.last = model, rows, device, last
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if model.training else None

    def work(self, number: int) -> None:
        """Work through a batch."""
        batch = self.rows["batches"][number]
        yes, no = self.rows["answer_ids"]
        options = {"logits_to_keep": 1} if self.last else {}
        with torch.set_grad_enabled(self.optimizer is not None):
            for first in range(0, len(batch), REFERENCE_ROWS):
                part = batch[first : first + REFERENCE_ROWS]
                padded = pad(part, left=True, answers=None, device=self.device)
                logits = self.model(**padded, **options).logits[:, -1]
                scores = logits[:, yes] - logits[:, no]
                if self.optimizer is None:
                    scores.cpu()
                    continue
                labels = torch.tensor([float(row["label"]) for row in part], device=self.device)
                loss = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
                (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
