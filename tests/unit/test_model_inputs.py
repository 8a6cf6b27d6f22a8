"""Entries of the report's column on what models read."""

import pytest

from collm_dist.config import CfConfig
from collm_dist.data.prompts.prompt_template import FIELDS, load_prompt_text
from collm_dist.evaluation.model_inputs import Inputs, describe_inputs, list_anchor_inputs, list_field_inputs


def describe(prompt, feedback="explicit", cf="mf"):
    text = load_prompt_text(prompt)
    return describe_inputs(
        list_field_inputs([field for field in FIELDS if field in text], CfConfig(model=cf)), feedback
    )


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("stage1", "earlier likes"),
        ("stage1_next", "earlier likes"),
        ("stage1_title", "item texts"),
        ("stage1_feedback", "earlier likes and dislikes"),
        ("stage1_rated", "earlier likes and dislikes"),
        ("stage1_user", "earlier likes, user texts"),
        ("stage2", "ids, earlier likes"),
        ("stage2_title", "ids, earlier likes"),
        ("stage2_ids", "ids, earlier likes"),
        ("stage2_rated", "ids, earlier likes and dislikes"),
        ("stage2_user", "ids, earlier likes, user texts"),
        ("stage2_pair", "all earlier feedback"),
    ],
)
def test_shipped_prompts(prompt, entry):
    assert describe(f"configs/prompts/{prompt}.txt") == entry


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("<UserID> <TargetItemTitle> <TargetItemID> ?", "ids, item texts"),
        ("<UserID> <TargetItemID> ?", "ids alone"),
        ("<UserText> <TargetItemID> ?", "ids, user texts"),
        ("<ItemIDList> <TargetItemID> ?", "ids, earlier likes"),
    ],
)
def test_ids_that_no_collaborative_model_gives(prompt, entry):
    assert describe(prompt, cf="none") == entry


def test_clicks_have_no_dislikes():
    assert describe("configs/prompts/stage1_rated.txt", "implicit") == "earlier likes"
    assert describe("configs/prompts/stage2_pair.txt", "implicit") == "all earlier likes"
    assert describe("<DislikedTitleList> <TargetItemTitle> ?") == "earlier dislikes"


def test_an_anchor_adds_what_it_reads():
    likes, counts = CfConfig(model="mf"), CfConfig(model="mf", feedback="all")
    expected = {(None, "likes"): "earlier likes", ("cf", "likes"): "ids, earlier likes",
                ("cf", "all"): "all earlier feedback", ("as_of", "likes"): "all earlier feedback",
                ("blend", "likes"): "all earlier feedback"}  # fmt: skip
    for (kind, feedback), entry in expected.items():
        anchor = list_anchor_inputs(kind, counts if feedback == "all" else likes)
        assert describe_inputs(Inputs.LIKES | anchor, "explicit") == entry


def test_every_field_of_a_prompt_has_inputs():
    assert all(list_field_inputs([field], CfConfig()) for field in FIELDS)
