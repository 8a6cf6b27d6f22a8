"""A validation with other weights, such as those before training, leaves no trace in the training."""

import pytest
import torch
from torch import nn

from collm_dist.tuning.deepspeed_config import build_deepspeed_config
from collm_dist.tuning.engine import TuningEngine, copy_trainable, init_distributed

INPUTS = torch.arange(12.0).reshape(3, 4) / 10


pytestmark = pytest.mark.usefixtures("same_environment")


@pytest.fixture(autouse=True)
def keep_linear(monkeypatch):
    """Restore the function that ZeRO-3 replaces for the whole process, with one that saves more activations."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


def build(zero_stage, dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    model[0].bias.requires_grad_(False)
    config = build_deepspeed_config(
        zero_stage=zero_stage, bfloat16=dtype == torch.bfloat16, max_grad_norm=1.0, extra={}
    )
    first = copy_trainable(model)
    settings = {"learning_rate": 0.1, "weight_decay": 0.01, "betas": (0.9, 0.999)}
    return TuningEngine(model, deepspeed_config=config, device=init_distributed(5), **settings), first


def step(engine, dtype):
    engine.set_training(True)
    engine.backward(engine(INPUTS.to(dtype)).float().square().mean(), is_last=True)
    engine.step(0.1)


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, torch.float32), (2, torch.float32), (3, torch.float32), (2, torch.bfloat16)]
)
def test_weights_return_to_the_bit(zero_stage, dtype):
    (plain, first), (looked, _) = build(zero_stage, dtype), build(zero_stage, dtype)
    start = plain(INPUTS.to(dtype)).detach()
    for engine in (plain, looked):
        step(engine, dtype)
    after = looked(INPUTS.to(dtype)).detach()
    assert not torch.equal(after, start)
    with looked.computing_with(first):
        assert torch.equal(looked(INPUTS.to(dtype)).detach(), start)
    assert torch.equal(looked(INPUTS.to(dtype)).detach(), after)
    for engine in (plain, looked):
        step(engine, dtype)
    states = [engine.export_state() for engine in (plain, looked)]
    for kind in ("weights", "moments"):
        assert all(
            torch.equal(value, getattr(states[1], kind)[name]) for name, value in getattr(states[0], kind).items()
        )
