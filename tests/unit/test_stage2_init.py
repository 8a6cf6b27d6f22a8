"""Initial weights of CF models that stage 2 trains, and settings that would train nothing."""

import pytest
import torch
from pydantic import ValidationError

from collm_dist.cf.model_files import load_cf_model
from collm_dist.cf.models.registry import check_tuning
from collm_dist.cf.stage2_init import load_for_tuning
from collm_dist.config import Config
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.errors import ConfigError
from collm_dist.orchestration.cf_search import describe_search
from tests.unit.cf_data import fit_and_export, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, NUM_USERS, write_data_step

DATASET = {"path": "x", "columns": {"rating": "rating"}}
# A CF model with scores but without vectors for slots.
FROZEN = {
    "mf": {"global_bias"},
    "sasrec": {"global_bias"},
    "din": {"global_bias", *(f"network.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")),
            "slopes.0.weight", "slopes.1.weight"},
}  # fmt: skip


def read_vectors(vectors):
    """Return user and item vectors of known and unknown users and items, with and without history."""
    users, items = torch.tensor([0, 3, NUM_USERS - 1, -1]), torch.tensor([2, 0, 3, -1])
    history, times = torch.tensor([[-1, 4], [1, 2], [0, 5], [-1, -1]]), torch.zeros(4)
    return vectors.user_vectors(users, history, items, times), vectors.item_vectors(items, times)


@pytest.fixture(scope="module", params=FROZEN)
def fitted(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    run_dir = write_data_step(path)
    fit_and_export(run_dir, make_cf(request.param), path / "states")
    return request.param, run_dir, load_manifest(run_dir.step_dir("data"))


def test_fitted_weights_are_trainable_if_vectors_depend_on_them(fitted):
    name, run_dir, manifest = fitted
    vectors = load_for_tuning(run_dir, manifest, from_scratch=False, init_scale=0.1, seed=0)
    frozen = {key for key, parameter in vectors.final.named_parameters() if not parameter.requires_grad}
    assert frozen == FROZEN[name]
    users, items = read_vectors(vectors)
    for vector, expected in zip((users, items), read_vectors(load_cf_model(run_dir, manifest)), strict=True):
        assert torch.equal(vector.detach(), expected)
    (users.square().sum() + items.square().sum()).backward()
    gradients = {key: parameter.grad for key, parameter in vectors.final.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and not gradient.is_sparse for gradient in gradients.values())
    assert gradients["items.weight"].abs().sum() > 0


def test_from_scratch_keeps_only_the_sets_of_known_users_and_items(fitted):
    name, run_dir, manifest = fitted
    first, again, other = (
        load_for_tuning(run_dir, manifest, from_scratch=True, init_scale=0.1, seed=seed) for seed in (0, 0, 1)
    )
    trained = load_cf_model(run_dir, manifest)
    assert torch.equal(first.final.items.known, trained.final.items.known)
    assert not first.final.users.weight[~trained.final.users.known].any()
    for drawn, same, seeded, fit in zip(*map(read_vectors, (first, again, other, trained)), strict=True):
        assert torch.equal(drawn, same)
        assert not torch.allclose(drawn, seeded)
        assert not torch.allclose(drawn, fit)
    known = first.final.items.known[:-1].nonzero().squeeze(1)
    norms = first.item_vectors(known, torch.zeros(len(known))).square().sum(1)
    assert norms.mean().item() == pytest.approx(1.0, rel=1e-4)
    assert not first.item_vectors(torch.tensor([-1, NUM_ITEMS + 7]), torch.zeros(2)).any()
    assert name == "din" or not first.final.items.weight[:, -1].any()


def test_a_model_that_stage_2_cannot_train_is_refused():
    check_tuning("mf")
    check_tuning("none")
    with pytest.raises(ConfigError, match=r"lightgcn.*stage2\.train_cf to false"):
        check_tuning("lightgcn")


def test_a_search_needs_a_model_that_is_fitted(tmp_path):
    sections = {"cf": {"model": "none"}, "stage2": {"train_cf": "scratch"}}
    config = Config.model_validate({"run": {"dir": str(tmp_path)}, "dataset": DATASET, **sections})
    with pytest.raises(ConfigError, match="set a collaborative model"):
        describe_search(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cf": {"model": "none"}}, "set stage2.train_cf to scratch"),
        ({"cf": {"model": "none"}, "stage2": {"train_cf": True}}, "set stage2.train_cf to scratch"),
        ({"cf": {"model": "none", "cross_fit": 4}, "stage2": {"train_cf": "scratch"}}, "cf.cross_fit to off"),
        ({"cf": {"model": "none", "feedback": "all"}, "stage2": {"train_cf": "scratch"}}, "cf.feedback to likes"),
        ({"cf": {"cross_fit": 4}, "stage2": {"train_cf": "scratch"}}, "set cf.cross_fit to off"),
        ({"cf": {"model": "lightgcn"}, "stage2": {"train_cf": True}}, "mf, sasrec, din or none"),
        ({"stage2": {"train_cf": "scratch"}, "cluster": {"zero_stage": 3}}, "cluster.zero_stage to 2 or less"),
        ({"stage2": {"train_cf": "anew"}}, "scratch"),
        (
            {"cf": {"model": "none"}, "stage2": {"train_cf": "scratch"}, "promotion": {"baseline": "cf"}},
            "has no CF model to compare with",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"run": {"dir": "x"}, "dataset": DATASET, **sections})
