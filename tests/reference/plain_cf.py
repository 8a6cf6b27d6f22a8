"""Reference implementations of the CF models from their papers: dense matrices, loops over rows, torch's own layers.

They read the weights of the package's modules and share no code with them. Table rows are (vector, bias).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def score_mf(model, users, items):
    """Return the logits of known users and items."""
    p, q = model.users.weight[users], model.items.weight[items]
    return model.global_bias + p[:, -1] + q[:, -1] + (p[:, :-1] * q[:, :-1]).sum(1)


def fold_in_mf(model, history, precision, steps=1):
    """Return an unknown user's vector by Newton steps from zero on log-likelihood and prior, in E unknowns."""
    q, bias = model.items.weight[history, :-1].double(), model.items.weight[history, -1].double()
    vector = torch.zeros(q.shape[1], dtype=torch.float64)
    for _ in range(steps):
        chance = torch.sigmoid(model.global_bias.double() + bias + q @ vector)
        gradient = q.T @ (1 - chance) - precision * vector
        hessian = q.T @ torch.diag(chance * (1 - chance)) @ q + precision * torch.eye(q.shape[1], dtype=torch.float64)
        vector = vector + torch.linalg.solve(hessian, gradient)
    return vector


def smooth_lightgcn(model, users, items, num_layers):
    """Return (U, E) and (I + 1, E): the mean over layers of powers of the dense normalized adjacency matrix.

    ``users`` and ``items`` are the training pairs.
    """
    num_users, num_items = len(model.users.weight), len(model.items.weight)
    ratings = torch.zeros(num_users, num_items, dtype=torch.float64)
    ratings[users, items] = 1
    adjacency = torch.zeros(num_users + num_items, num_users + num_items, dtype=torch.float64)
    adjacency[:num_users, num_users:] = ratings
    adjacency[num_users:, :num_users] = ratings.T
    degrees = adjacency.sum(1)
    scale = torch.where(degrees > 0, degrees.clamp(min=1) ** -0.5, torch.zeros_like(degrees))
    normalised = scale[:, None] * adjacency * scale[None, :]
    start = torch.cat([model.users.weight[:, :-1], model.items.weight[:, :-1]]).double()
    layers = [torch.linalg.matrix_power(normalised, power) @ start for power in range(num_layers + 1)]
    smoothed = torch.stack(layers).mean(0)
    return smoothed[:num_users], smoothed[num_users:]


def encode_sasrec(model, history):
    """Return the state after a history (a list of items), by torch.nn.MultiheadAttention with an explicit mask."""
    width, length = model.dim, len(history)
    states = model.items.weight[history, :-1] * math.sqrt(width) + model.positions[len(model.positions) - length :]
    mask = torch.full((length, length), float("-inf"), dtype=states.dtype).triu(1)
    for block in model.blocks:
        attention = nn.MultiheadAttention(width, block.num_heads, dtype=states.dtype)
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
            attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
            attention.out_proj.weight.copy_(torch.eye(width))  # the paper has no output projection
            attention.out_proj.bias.zero_()
        normed = block.attention_norm(states)
        attended, _ = attention(normed[:, None], states[:, None], states[:, None], attn_mask=mask)
        states = normed + attended[:, 0]
        normed = block.network_norm(states)
        states = normed + block.outer(torch.relu(block.inner(normed)))
    return model.final_norm(states[-1])


def attend_din(model, history, target):
    """Return the interest for a target, one history item at a time."""
    interest = torch.zeros(model.dim, dtype=model.items.weight.dtype)
    item = model.items.weight[target, :-1]
    for liked in history:
        vector = model.items.weight[liked, :-1]
        states = model.item_part(vector) + model.target_part(item) + model.product_part(vector * item)
        for layer in model.attention:
            states = layer(torch.sigmoid(states))
        interest = interest + states * vector
    return interest


def score_din(model, user_bias, history, target):
    """Return the logit of one pair."""
    item = model.items.weight[target]
    interest = attend_din(model, history, target)
    states = torch.cat([interest, item[:-1], interest * item[:-1]])
    for number, layer in enumerate(model.network):
        states = layer(states)
        if number < len(model.network) - 1:
            states = functional.prelu(states[None], model.slopes[number].weight)[0]
    return model.global_bias[0] + user_bias + item[-1] + states[0]
