"""Items known by their text: text vectors, and what they add to every CF model."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from collm_dist.cf.batches import CfBatch
from collm_dist.cf.item_text import compute_text_vectors, keep_text
from collm_dist.cf.jobs import plan_jobs
from collm_dist.cf.model_files import load_cf_model, load_model
from collm_dist.cf.stage2_init import load_for_tuning
from collm_dist.cf.weight_transfer import load_previous_weights
from collm_dist.config import CfConfig
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.metrics import compute_auc
from tests.unit.cf_data import MODELS, build, fit_and_export, load_data, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, build_config, write_data_step

TEXTS = ["red lamp", "blue lamp", "red chair", "blue chair", "", "Lamp!"]
# In the data of ``write_data_step(taste=True)`` a user likes the items of one parity; the last three items are new
# after the training rows.
PARITY = np.eye(2, dtype=np.float32)[np.arange(NUM_ITEMS) % 2]
COLD = torch.arange(NUM_ITEMS - 3, NUM_ITEMS)


def fit_with_text(folder, cf, vectors=PARITY, **data):
    """Train a model with text vectors and write its files."""
    run_dir = write_data_step(folder, taste=True, **data)
    path = folder / "item_text.npy"
    np.save(path, vectors)
    fit_and_export(run_dir, cf, folder / "states", item_text=path)
    return run_dir


def test_text_vectors_keep_the_cosines_of_the_terms():
    """With all dimensions, cosines equal those of the TF-IDF vectors. Measured: they differ by 2e-7, float32."""
    vectors = compute_text_vectors(TEXTS, 20)
    terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(TEXTS).toarray()
    assert np.abs(vectors @ vectors.T - terms @ terms.T).max() < 1e-6
    assert vectors.dtype == np.float32
    assert not vectors[4].any()
    assert not vectors[:, 6:].any()


def test_narrow_text_vectors_have_unit_length_and_are_the_same_each_time():
    texts = [f"{first} {second}" for first in "abcdefgh" for second in "ijklmnop"]
    vectors = compute_text_vectors(texts, 5)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(64), abs=1e-5)
    assert np.array_equal(vectors, compute_text_vectors(texts, 5))
    assert not compute_text_vectors(["", "?"], 3).any()


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_a_table_with_the_map_written_out(tmp_path, name):
    """A model with texts scores like one whose table holds row + map of the text. Measured: equal."""
    run_dir = write_data_step(tmp_path)
    text = torch.randn(NUM_ITEMS, 3, generator=torch.Generator().manual_seed(1))
    plain, _ = build(run_dir, make_cf(name))
    model, _ = build(run_dir, make_cf(name))
    model.items.add_text(text)
    torch.nn.init.normal_(model.items.text.map.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    model.refresh()
    written = torch.cat([text, torch.zeros(1, 3)]) @ model.items.text.map.weight.T
    with torch.no_grad():
        rows = plain.items.weight[plain.items.resolve(torch.arange(NUM_ITEMS + 1))] + written
        plain.items.weight.copy_(rows)
    plain.items.known[:-1] = True  # each new item has a row of its own there
    plain.refresh()
    users, items = torch.arange(NUM_ITEMS) % 20, torch.arange(-1, NUM_ITEMS - 1)
    history = torch.stack([torch.arange(NUM_ITEMS), COLD[torch.arange(NUM_ITEMS) % 3]], dim=1)
    for someone in (users, torch.full_like(users, -1)):
        expected = plain.score(someone, history, items)
        assert (model.score(someone, history, items) - expected).abs().max() < 1e-5
        vectors = model.user_vectors(someone, history, items)
        assert (vectors - plain.user_vectors(someone, history, items)).abs().max() < 1e-5
    assert (model.item_vectors(COLD) - plain.item_vectors(COLD)).abs().max() < 1e-5
    assert model.item_vectors(COLD).abs().max() > 0.01
    assert not model.item_vectors(torch.tensor([-1, NUM_ITEMS])).any()


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_item_is_known_by_its_text_alone(tmp_path, name):
    """In training it has the logits that an unseen item with its text has at scoring. Measured: equal."""
    model, _ = build(write_data_step(tmp_path), make_cf(name))
    text = torch.randn(NUM_ITEMS, 3, generator=torch.Generator().manual_seed(1))
    items = torch.arange(len(COLD))
    text[COLD] = text[items]
    model.items.add_text(text)
    torch.nn.init.normal_(model.items.text.map.weight, generator=torch.Generator().manual_seed(2))
    model.refresh()
    assert torch.equal(keep_text(keep_text(items)), items)
    assert torch.equal(model.items(keep_text(items)), model.items.weight[-1] + model.items.text(items))
    users, history = torch.arange(len(COLD)), torch.tensor([[4, 5], [-1, 6], [-1, -1]])
    unseen, seen = model.score(users, history, COLD), model.score(users, history, items)
    masked = model.train().score(users, history, keep_text(items))
    assert (masked - unseen).abs().max() < 1e-6
    assert (masked - seen).abs().max() > 0.1
    masked.sum().backward()
    assert (model.items.text.map.weight.grad.norm(dim=1) > 1e-4).all()


def test_the_penalty_of_an_epoch_is_that_of_the_prior(tmp_path):
    model, data = build(write_data_step(tmp_path), make_cf("mf"))
    rows = data.splits["train"]
    batches = [rows.take(part, 8)[0] for part in torch.arange(rows.num_contexts).split(7)]
    without = sum(model.penalty(batch, 2.0, 0.5).item() for batch in batches)
    model.items.add_text(torch.from_numpy(PARITY), rows.total_rows)
    torch.nn.init.normal_(model.items.text.map.weight, generator=torch.Generator().manual_seed(2))
    squares = model.items.text.map.weight.square().sum(dim=1)
    expected = (2.0 * squares[:-1].sum() + 0.5 * squares[-1]).item() / 2
    assert sum(model.penalty(batch, 2.0, 0.5).item() for batch in batches) - without == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize(
    "name", ["mf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lightgcn", "sasrec", "din"))]
)
def test_new_items_are_ranked_by_their_text(tmp_path, name):
    """AUC of items that training never saw. Measured: mf and din .998, lightgcn .958, sasrec .975."""
    settings = {"num_epochs": 40, "early_stop_patience": 40, "unknown_item_share": 0.1, "embedding_dim": 4}
    run_dir = fit_with_text(tmp_path, make_cf(name, **settings), count=3000)
    manifest, data = load_data(run_dir)
    model = load_cf_model(run_dir, manifest).final
    rows = data.splits["test"]
    batch, _ = rows.take(torch.arange(rows.num_contexts), 8)
    chosen = torch.isin(batch.item_idx, COLD)
    targets = CfBatch(
        batch.user_idx, batch.history, batch.target_contexts[chosen], batch.item_idx[chosen], features=None
    )
    assert compute_auc(rows.label[chosen].numpy(), model(targets).detach().numpy()) > 0.85
    without = write_data_step(tmp_path / "without", taste=True, count=3000)
    fit_and_export(without, make_cf(name, **settings), tmp_path / "without" / "states")
    blind = load_cf_model(without, manifest).final
    scores = blind.score(torch.tensor([0, 1]), batch.history[:2], COLD[:2])
    assert (blind.item_vectors(COLD) == 0).all()
    assert scores.isfinite().all()


def test_tuning_and_loading_keep_the_texts(tmp_path):
    run_dir = fit_with_text(tmp_path, make_cf("mf"))
    manifest = load_manifest(run_dir.step_dir("data"))
    _, model = load_model(run_dir.step_dir("cf") / "model.safetensors")
    assert torch.equal(model.items.text.vectors[:-1], torch.from_numpy(PARITY))
    for from_scratch in (False, True):
        tuned = load_for_tuning(run_dir, manifest, from_scratch=from_scratch, init_scale=0.1, seed=0).final
        assert torch.equal(tuned.items.text.vectors, model.items.text.vectors)
        assert tuned.items.text.map.weight.requires_grad
    users = load_data(run_dir)[1].users
    weights, message = load_previous_weights(
        run_dir.step_dir("cf") / "model.safetensors", "mf", model, users, torch.zeros(0, dtype=torch.int64)
    )
    assert weights is None
    assert "cf.item_text" in message


def test_the_step_computes_the_vectors_once(tmp_path):
    run_dir = write_data_step(tmp_path)
    config = build_config(tmp_path).model_copy(update={"cf": CfConfig(item_text=4)})
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (job,) = plan_jobs(config, run_dir.step_dir("data"), folder, "k" * 64)
    vectors = job.load_item_text()
    assert vectors.shape == (NUM_ITEMS, 4)
    written = job.item_text.stat().st_mtime_ns
    (again,) = plan_jobs(config, run_dir.step_dir("data"), folder, "k" * 64)
    assert again.item_text.stat().st_mtime_ns == written
    (other,) = plan_jobs(config, run_dir.step_dir("data"), folder, "l" * 64)
    assert other.item_text != job.item_text


@pytest.mark.parametrize("model", ["table", "none"])
def test_models_without_learned_item_vectors_refuse_texts(model):
    with pytest.raises(ValueError, match=f"cf.item_text 8 needs a model that learns item vectors.*'{model}'"):
        CfConfig(model=model, item_text=8, item_vectors="x.parquet")
