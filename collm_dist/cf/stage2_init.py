"""Initial and trainable weights of a CF model that stage 2 trains.

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
    """Load a run's CF model with gradients for exactly the parameters that its exported vectors depend on.

    Args:
        run_dir, manifest: of a run without time folds.
        from_scratch: draw new weights; the sets of known users and items stay.
        init_scale: standard deviation of newly drawn vectors.
        seed: of the draws.

    Raises:
        ArtifactError: see ``load_cf_model``.
        ConfigError: the model cannot be trained in stage 2.
    """
    vectors = load_cf_model(run_dir, manifest)
    header, trained = load_model(run_dir.step_dir("cf") / FILE_NAME)
    check_tuning(header.model)
    if from_scratch:
        vectors = SlotVectors([_build_untrained(header, trained, init_scale, seed)], ())
    model = vectors.final
    model.users.sparse = model.items.sparse = False  # DeepSpeed's AdamW does not support sparse gradients
    model.requires_grad_(True)
    users, histories, targets = _sample(model)
    total = model.user_vectors(users, histories, targets).sum() + model.item_vectors(targets).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)  # DIN's final MLP, for example, affects scores but not vectors
    return vectors


def _build_untrained(header: ModelHeader, trained: TrainableCfModel, scale: float, seed: int) -> TrainableCfModel:
    """Return a model of the same class with new weights; its exported vectors are unit-scaled too.

    It depends only on the file and the seed, so a finished stage can rebuild the weights that it did not train.
    """
    num_users = len(trained.users.known)
    model = get_model_class(header.model)(num_users, header.num_items, **header.arguments).eval()
    if trained.items.text is not None:
        model.items.add_text(trained.items.text.vectors[:-1])
    model.init_weights(
        trained.users.known.long(), trained.items.known.long(), torch.arange(num_users), scale=scale, seed=seed
    )
    factors = compute_export_factors(model, None, _sample(model))
    model.load_state_dict(factors, strict=False)
    return model


def _sample(model: TrainableCfModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return (S,) known users, (S, 1) histories and (S,) targets; items are taken in turn from both ends."""
    users, items = (known.nonzero().squeeze(1) for known in (model.users.known, model.items.known[:-1]))
    count = min(max(len(users), len(items)), _SAMPLED)
    numbers = torch.arange(count)
    if len(users) == 0:
        users = torch.tensor([-1])
    if len(items) == 0:
        items = torch.tensor([-1])
    return users[numbers % len(users)], items[numbers % len(items)][:, None], items[-1 - numbers % len(items)]
