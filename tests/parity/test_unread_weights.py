"""A trainable weight that no pass reads, as a few backbones have, is saved and resumed like others."""

import pytest
import torch
from torch import nn

from collm_dist.tuning.deepspeed_config import build_deepspeed_config
from collm_dist.tuning.engine import TuningEngine, init_distributed
from tests.parity.test_other_weights import keep_linear, step  # noqa: F401 (keep_linear is a fixture)

pytestmark = pytest.mark.usefixtures("same_environment")
CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in (torch.float32, torch.bfloat16)]


def build(zero_stage, dtype, state=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 1))
    model.register_parameter("unread", nn.Parameter(torch.ones(3)))
    config = build_deepspeed_config(
        zero_stage=zero_stage, bfloat16=dtype == torch.bfloat16, max_grad_norm=1.0, extra={}
    )
    settings = {"learning_rate": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    device = init_distributed(5)
    return TuningEngine(model.to(dtype), deepspeed_config=config, device=device, state=state, **settings)


@pytest.mark.parametrize(("zero_stage", "dtype"), CASES)
def test_its_state_is_saved_and_resumed(zero_stage, dtype):
    whole = build(zero_stage, dtype)
    step(whole, dtype)
    state = whole.export_state()
    assert state.weights["unread"].equal(torch.ones(3))
    assert not state.moments["exp_avg.unread"].any()
    resumed = build(zero_stage, dtype, state)
    for engine in (whole, resumed):
        step(engine, dtype)
    ends = [engine.export_state() for engine in (whole, resumed)]
    for kind in ("weights", "moments"):
        first, second = (getattr(end, kind) for end in ends)
        assert first.keys() == second.keys()
        assert all(value.equal(second[name]) for name, value in first.items())
