"""Initial biases: the ones that explain the labels best without vectors.

A logistic regression on user and item identity under the biases' prior, fitted by Newton's method one coordinate at a
time: given the item biases, each user bias is a problem in one unknown, and vice versa. So no seed starts at chance
level, and the vectors learn only the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collm_dist.cf.batches import Rows
from collm_dist.cf.models import TrainableCfModel
from collm_dist.distributed import sum_over_workers

_ROUNDS = 12  # the change in a bias is below 1e-3 after about ten on ML-1M


@torch.no_grad()
def fit_biases(model: TrainableCfModel, train: Rows, bias_weight_decay: float) -> None:
    """Set the global, user and item biases. All workers call this together; user rows are not communicated.

    Args:
        model: initialized model; its vectors are not read.
        train: this worker's training rows, numbered globally.
        bias_weight_decay: inverse variance of the prior on a bias.
    """
    users, items = train.row_users.long(), model.items.resolve(train.item_idx.long())
    labels = train.label.double()
    user_bias = labels.new_zeros(len(model.users.weight))
    item_bias = labels.new_zeros(len(model.items.weight))
    likes = sum_over_workers(labels.sum())
    share = (likes + 1) / (train.total_rows + 2)
    base = torch.log(share / (1 - share))
    for _ in range(_ROUNDS):
        for biases, owners, is_shared in ((user_bias, users, False), (item_bias, items, True)):
            chance = torch.sigmoid(base + user_bias[users] + item_bias[items])
            slope, curvature = _sum_by(labels - chance, owners, biases), _sum_by(chance * (1 - chance), owners, biases)
            if is_shared:
                slope, curvature = sum_over_workers(torch.stack([slope, curvature]))
            step = (slope - bias_weight_decay * biases) / (curvature + max(bias_weight_decay, 1e-3))
            biases += step.clamp(-2, 2)  # Newton overshoots where all labels are equal
    model.users.weight[:, -1] = user_bias.float()
    model.items.weight[:, -1] = item_bias.float()
    model.global_bias.fill_(float(base))


def _sum_by(values: Tensor, owners: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(0, owners, values)
