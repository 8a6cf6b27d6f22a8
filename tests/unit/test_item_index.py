"""Retrieval by inner products: the vectors of the collaborative models, exact search, and FAISS's inverted lists."""

import numpy as np
import pytest
import torch

from collm_dist.cf.batches import CfBatch
from collm_dist.serving.item_index import MIN_RECALL, ItemIndex
from tests.unit.cf_data import build, make_cf
from tests.unit.evaluation_run import NUM_ITEMS, NUM_USERS, write_data_step


def draw_vectors(num_items=3000, width=8):
    """Return clustered item vectors and queries, as training makes them."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, width))
    items = centres[random.integers(40, size=num_items)] + random.normal(size=(num_items, width)) / 2
    queries = centres[random.integers(40, size=16)] + random.normal(size=(16, width)) / 2
    return items.astype(np.float32), queries.astype(np.float32)


@pytest.mark.parametrize("has_text", [False, True], ids=["", "text"])
@pytest.mark.parametrize("name", ["mf", "lightgcn", "sasrec"])
def test_inner_products_are_the_logits_up_to_a_users_constant(tmp_path, name, has_text):
    """Measured: 3e-7, float32."""
    model, _ = build(write_data_step(tmp_path), make_cf(name))
    torch.manual_seed(0)
    if has_text:
        model.items.add_text(torch.randn(NUM_ITEMS, 3), 100)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.refresh()
    users, items = torch.arange(NUM_USERS), torch.arange(NUM_ITEMS)
    batch = CfBatch.from_pairs(users, torch.randint(0, NUM_ITEMS, (NUM_USERS, 4)), users.clamp(max=NUM_ITEMS - 1))
    with torch.no_grad():
        products = model.compute_queries(batch) @ model.item_rows(items).T
        pairs = CfBatch(users, batch.history, users.repeat_interleave(NUM_ITEMS), items.repeat(NUM_USERS))
        logits = model(pairs).view(NUM_USERS, NUM_ITEMS)
    difference = logits - products
    assert (difference - difference[:, :1]).abs().max() < 1e-5


def test_din_has_no_inner_products(tmp_path):
    model, _ = build(write_data_step(tmp_path), make_cf("din"))
    users = torch.arange(NUM_USERS)
    assert model.compute_queries(CfBatch.from_pairs(users, users[:, None], users)) is None


def test_few_items_are_searched_exactly():
    items, queries = draw_vectors()
    index, allowed = ItemIndex(items, queries), np.arange(len(items)) % 3 == 0
    assert index.recall == 1
    for query in queries:
        order = np.argsort(-(items @ query), kind="stable")
        assert index.search(query, 25).tolist() == order[:25].tolist()
        assert index.search(query, 25, allowed).tolist() == order[allowed[order]][:25].tolist()
        assert len(index.search(query, 10**6)) == len(items)


def test_many_items_are_searched_in_cells_with_the_recall_that_is_reported():
    """Measured: recall .98 over the queries, 0.97 over others."""
    pytest.importorskip("faiss", reason="needs pip install 'collm-dist[retrieval]'")
    items, queries = draw_vectors()
    exact, index = ItemIndex(items, queries), ItemIndex(items, queries, exact_below=1000)
    assert index.recall >= MIN_RECALL
    _, others = draw_vectors(num_items=3001)
    shared = [len(set(index.search(query, 200)) & set(exact.search(query, 200))) for query in others]
    assert np.mean(shared) / 200 > MIN_RECALL - 0.05
    few = np.arange(len(items)) % 100 == 0
    for query in queries:
        assert few[index.search(query, 10, few)].all()
        assert index.search(query, 10, few).tolist() == exact.search(query, 10, few).tolist()


def test_an_index_returns_allowed_items_alone_and_as_many_as_an_exact_search():
    """Measured: recall 0.99 if most items are allowed; if the compared cells have too few of them, all are searched."""
    pytest.importorskip("faiss", reason="needs pip install 'collm-dist[retrieval]'")
    items, queries = draw_vectors()
    exact, index = ItemIndex(items, queries), ItemIndex(items, queries, exact_below=1000)
    most = np.arange(len(items)) % 10 != 0
    found = [index.search(query, 200, most) for query in queries]
    assert all(most[best].all() for best in found)
    best = [exact.search(query, 200, most) for query in queries]
    shared = [len(set(ours) & set(theirs)) for ours, theirs in zip(found, best, strict=True)]
    assert np.mean(shared) / 200 > MIN_RECALL - 0.05
    far = items @ queries[0] < np.median(items @ queries[0])
    assert index.search(queries[0], 1200, far).tolist() == exact.search(queries[0], 1200, far).tolist()
