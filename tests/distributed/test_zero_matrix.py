"""ZeRO stages, offload and activation checkpointing, alone and combined, against one plain process, in both stages.

Losses, gradient norms and validation metrics of every step are compared; tests/parity checks the plain process itself.
"""

from __future__ import annotations

import itertools
import json

import pytest

from tests.distributed.conftest import run
from tests.distributed.test_tuning import PYTHON, TORCHRUN, assert_same_training

OFFLOAD_PARAMETERS = '{"zero_optimization": {"offload_param": {"device": "cpu"}}}'
OFFLOAD_OPTIMIZER = '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'
CASES = [
    pytest.param(stage, checkpointing, "{}", marks=pytest.mark.slow, id=f"zero{stage}-{checkpointing}")
    for stage, checkpointing in itertools.product((0, 1, 2, 3), (False, True))
] + [
    pytest.param(2, False, OFFLOAD_OPTIMIZER, marks=pytest.mark.slow, id="zero2-optimizer-offload"),
    pytest.param(3, False, OFFLOAD_OPTIMIZER, marks=pytest.mark.slow, id="zero3-optimizer-offload"),
    pytest.param(3, False, OFFLOAD_PARAMETERS, marks=pytest.mark.slow, id="zero3-parameter-offload"),
    pytest.param(3, True, OFFLOAD_PARAMETERS, marks=pytest.mark.slow, id="zero3-checkpointed-parameter-offload"),
]


@pytest.mark.parametrize(("zero_stage", "checkpointing", "extra"), CASES)
def test_every_case_trains_the_same(copy_run, zero_stage, checkpointing, extra):
    plain, overrides = copy_run("plain")
    run(PYTHON, overrides)
    other, overrides = copy_run("other")
    run(
        TORCHRUN,
        [*overrides, f"cluster.zero_stage={zero_stage}", f"cluster.deepspeed_extra={extra}",
         f"llm.activation_checkpointing={json.dumps(checkpointing)}"],
    )  # fmt: skip
    effective = json.loads((other / "stage2" / "deepspeed_config.json").read_text())["zero_optimization"]
    assert effective == {"stage": zero_stage, **json.loads(extra).get("zero_optimization", {})}
    assert_same_training(other, plain)
