"""Automatic token budget, measured on a real model and this machine."""

import dataclasses

import numpy as np
import pytest
import torch

from collm_dist.data.prompts.micro_batches import plan_micro_batches
from collm_dist.data.prompts.prompt_layout import TokenCounts
from collm_dist.data.prompts.target_groups import find_groups
from collm_dist.llm.collm import CollmModel
from collm_dist.llm.lora import add_lora
from collm_dist.monitoring import PeakMeter
from collm_dist.tuning.token_budget import (
    BATCH_TOKENS_MARGIN,
    TRIAL_TOKENS,
    _choose_fastest,
    _list_trials,
    find_token_budget,
)
from tests.parity.test_shared_context import STAGE1, make_block, make_collator
from tests.tiny import make_model


def test_the_budget_is_one_of_the_trials_and_any_batch_fits_it(tmp_path):
    _, collator = make_collator(STAGE1, tmp_path, stage2=False)
    block = make_block([3] * 60)
    backbone = make_model("llama", dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=0.1, target_modules=("q_proj", "v_proj"), seed=1)
    model = CollmModel(backbone, (5, 6), "yes_minus_no")
    before = {name: param.clone() for name, param in model.named_parameters()}
    budget = find_token_budget(model, collator, block, torch.device("cpu"))
    counts = collator.count_tokens(block)
    assert budget.tokens <= max(TRIAL_TOKENS["cpu"])
    assert budget.free_bytes > 0
    pieces = plan_micro_batches(block, counts, 0, 1, budget.tokens)
    assert sum(piece.num_targets for piece in pieces) == block.num_targets
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


def test_a_row_longer_than_every_trial_still_fits(tmp_path):
    _, collator = make_collator(
        "<ItemTitleList> " + "x" * 3000 + "<TargetItemTitle> Answer:", tmp_path, stage2=False, most=9000
    )
    block = make_block([1, 1])
    backbone = make_model("llama", dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    budget = find_token_budget(CollmModel(backbone, (5, 6), "yes"), collator, block, torch.device("cpu"))
    counts = collator.count_tokens(block)
    assert budget.tokens >= int((counts.tail[block.target_contexts] + counts.branch).max()) > 3000
    plan_micro_batches(block, counts, 0, 1, budget.tokens)


def test_groups_fit_the_budget_even_if_the_measured_block_has_small_ones(tmp_path):
    """Branches of 250 tokens: a full group has more than the largest trial."""
    _, collator = make_collator("<ItemTitleList>. And <TargetItemTitle>" + "x" * 200, tmp_path, stage2=False, most=2000)
    small, large = (dataclasses.replace(block, group_id=block.row_id) for block in (make_block([2]), make_block([40])))
    backbone = make_model("llama", dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    model = CollmModel(backbone, (5, 6), "yes")
    budget = find_token_budget(model, collator, small, torch.device("cpu"), keep_groups=True)
    assert budget.tokens > max(TRIAL_TOKENS["cpu"])
    plan_micro_batches(large, collator.count_tokens(large), 0, 1, budget.tokens, find_groups(large))


def test_the_meter_sees_memory_that_was_freed():
    with PeakMeter(torch.device("cpu")) as meter:
        np.ones(50_000_000 // 8)
    assert 45e6 < meter.extra_bytes < 80e6


def test_a_meter_from_the_first_entry_counts_memory_kept_since():
    meter = PeakMeter(torch.device("cpu"), from_first=True)
    with meter:
        kept = np.ones(50_000_000 // 8)
    with meter:
        pass
    assert kept.nbytes * 0.9 < meter.extra_bytes < kept.nbytes * 1.6


def test_a_cpu_takes_the_smallest_budget_that_is_nearly_the_fastest():
    def choose(*seconds):
        return TRIAL_TOKENS["cpu"][_choose_fastest(list(seconds))]

    assert choose(1.02, 1.0, 1.0) == 512
    assert choose(1.2, 1.02, 1.0) == 1024
    assert choose(1.2, 1.04, 1.0) == 2048


def test_larger_global_batches_stay_undivided_if_a_whole_one_is_fastest(tmp_path):
    _, collator = make_collator(STAGE1, tmp_path, stage2=False)
    small, larger = make_block([3, 2]), make_block([4, 3])
    backbone = make_model("llama", dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    budget = find_token_budget(CollmModel(backbone, (5, 6), "yes"), collator, small, torch.device("cpu"))
    tokens = [collator.collate(block, block).num_tokens for block in (small, larger)]
    assert tokens[0] < min(TRIAL_TOKENS["cpu"])
    assert budget.tokens == BATCH_TOKENS_MARGIN * tokens[0] > tokens[1]
    assert len(plan_micro_batches(larger, collator.count_tokens(larger), 0, 1, budget.tokens)) == 1


@pytest.mark.parametrize("sizes", [[1], [3] * 4, [3] * 7, [3] * 13, [3] * 16, [3] * 19, [3] * 60])
def test_the_trials_take_no_longer_than_a_few_steps(tmp_path, sizes):
    _, collator = make_collator(STAGE1, tmp_path, stage2=False)
    block, computed = make_block(sizes), []
    backbone = make_model("llama", dtype=torch.float32)
    add_lora(backbone, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=1)
    model = CollmModel(backbone, (5, 6), "yes")
    model.register_forward_pre_hook(lambda _, arguments: computed.append(arguments[0].num_tokens))
    find_token_budget(model, collator, block, torch.device("cpu"))
    step = collator.collate(block, block).num_tokens
    assert 2 * min(step, 400) <= sum(computed) <= 3.6 * step


def test_trials_on_a_cpu_count_tokens_that_train():
    counts = TokenCounts(np.array([90, 60]), np.array([5, 5]), np.array([10, 10, 20]), header=30)
    assert _list_trials(counts, torch.device("cpu")) == [4 * tokens for tokens in TRIAL_TOKENS["cpu"]]
    assert _list_trials(counts, torch.device("cuda")) == list(TRIAL_TOKENS["cuda"])
    without_prefix = TokenCounts(np.zeros(2, dtype=int), np.array([95, 65]), counts.branch, header=30)
    assert _list_trials(without_prefix, torch.device("cpu")) == list(TRIAL_TOKENS["cpu"])
