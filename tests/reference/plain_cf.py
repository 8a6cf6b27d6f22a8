"""The collaborative models written plainly from their papers: dense matrices, loops over rows, torch's own layers.

They read the weights out of the package's modules and share nothing else with them. Rows of a table are (vector, bias).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def score_mf(model, users, items):
    """Logits of known users and items from the tables."""
    p, q = model.users.weight[users], model.items.weight[items]
    return model.global_bias + p[:, -1] + q[:, -1] + (p[:, :-1] * q[:, :-1]).sum(1)


def fold_in_mf(model, history, precision, steps=1):
    """An unknown user's vector: Newton's method from zero on log-likelihood and prior, with E unknowns."""
    q, bias = model.items.weight[history, :-1].double(), model.items.weight[history, -1].double()
    vector = torch.zeros(q.shape[1], dtype=torch.float64)
    for _ in range(steps):
        chance = torch.sigmoid(model.global_bias.double() + bias + q @ vector)
        gradient = q.T @ (1 - chance) - precision * vector
        hessian = q.T @ torch.diag(chance * (1 - chance)) @ q + precision * torch.eye(q.shape[1], dtype=torch.float64)
        vector = vector + torch.linalg.solve(hessian, gradient)
    return vector


def smooth_lightgcn(model, users, items, num_layers):
    """Mean over layers of powers of the dense normalised adjacency matrix, all users and items in one matrix.

    ``users``, ``items`` are the training pairs. Returns (U, E) and (I + 1, E).
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
    """The user's state after a history (a list of item rows), by torch.nn.MultiheadAttention with an explicit mask."""
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
    """The interest that a target meets, one history item after the other."""
    interest = torch.zeros(model.dim, dtype=model.items.weight.dtype)
    item = model.items.weight[target, :-1]
    for one in history:
        vector = model.items.weight[one, :-1]
        states = model.item_part(vector) + model.target_part(item) + model.product_part(vector * item)
        for layer in model.attention:
            states = layer(torch.sigmoid(states))
        interest = interest + states * vector
    return interest


def score_din(model, user_bias, history, target):
    """The logit of one pair."""
    item = model.items.weight[target]
    interest = attend_din(model, history, target)
    states = torch.cat([interest, item[:-1], interest * item[:-1]])
    for number, layer in enumerate(model.network):
        states = layer(states)
        if number < len(model.network) - 1:
            states = functional.prelu(states[None], model.slopes[number].weight)[0]
    return model.global_bias[0] + user_bias + item[-1] + states[0]
