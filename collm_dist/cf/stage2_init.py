"""A collaborative model that stage 2 trains: the weights that it begins with, and those that it may change.

Shapes: S sampled users, H = 1 history items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collm_dist.cf.model_export import compute_export_factors
from collm_dist.cf.model_files import FILE_NAME, ModelHeader, load_cf_model, load_model
from collm_dist.cf.models import TrainableCfModel
from collm_dist.cf.models.registry import check_tuning, get_model_class
from collm_dist.cf.slot_vectors import SlotVectors
from collm_dist.data.shards.manifest import Manifest
from collm_dist.runs.run_dir import RunDir

_SAMPLED = 10_000


def load_for_tuning(
    run_dir: RunDir, manifest: Manifest, *, from_scratch: bool, init_scale: float, seed: int
) -> SlotVectors:
    """Load a run's collaborative model with gradients for all that its vectors come from, and for nothing else.

    Args:
        run_dir, manifest: of the run, whose model is one without folds.
        from_scratch: draw the weights anew; which users and items training knows stays.
        init_scale: standard deviation of vectors drawn anew.
        seed: of the draw.

    Raises:
        ArtifactError: see ``load_cf_model``.
        ConfigError: the model cannot be trained in stage 2.
    """
    vectors = load_cf_model(run_dir, manifest)
    header, trained = load_model(run_dir.step_dir("cf") / FILE_NAME)
    check_tuning(header.model)
    if from_scratch:
        vectors = SlotVectors([_draw_anew(header, trained, init_scale, seed)], ())
    model = vectors.final
    model.users.sparse = model.items.sparse = False  # AdamW, as DeepSpeed has it, takes no sparse gradients
    model.requires_grad_(True)
    users, histories, targets = _sample(model)
    made = model.user_vectors(users, histories, targets).sum() + model.item_vectors(targets).sum()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(made, list(named.values()), allow_unused=True)
    for parameter, gradient in zip(named.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)  # DIN's last network, say, makes scores and no vectors
    return vectors


def _draw_anew(header: ModelHeader, trained: TrainableCfModel, scale: float, seed: int) -> TrainableCfModel:
    """Return an untrained model of the same kind; its exported vectors are of unit size, too.

    All follows from the file and the seed, so a finished stage finds what of it was never trained.
    """
    num_users = len(trained.users.known)
    model = get_model_class(header.model)(num_users, header.num_items, **header.arguments).eval()
    model.init_weights(
        trained.users.known.long(), trained.items.known.long(), torch.arange(num_users), scale=scale, seed=seed
    )
    factors = compute_export_factors(model, None, _sample(model))
    model.load_state_dict(factors, strict=False)
    return model


def _sample(model: TrainableCfModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return (S,) known users, each with a history of (S, 1) known item and a (S,) target, in turn from both ends."""
    users, items = (known.nonzero().squeeze(1) for known in (model.users.known, model.items.known[:-1]))
    count = min(max(len(users), len(items)), _SAMPLED)
    numbers = torch.arange(count)
    if len(users) == 0:
        users = torch.tensor([-1])
    if len(items) == 0:
        items = torch.tensor([-1])
    return users[numbers % len(users)], items[numbers % len(items)][:, None], items[-1 - numbers % len(items)]
