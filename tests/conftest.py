"""Shared fixtures: an offline environment, tiny models, tiny logs."""

from __future__ import annotations

import os

# Set before torch, transformers or Ray are imported; processes started by tests inherit them.
os.environ["OMP_NUM_THREADS"] = "1"  # a process forked after a parallel region of OpenMP crashes in its own
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# A shell lets processes in the background ignore Ctrl-C, and their children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
ML1M_PLACE = REPOSITORY.parent / "shared" / "data" / "ml-1m-collm"
NUM_USERS, NUM_ITEMS = 60, 80


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Remove new environment variables: a process group of one may stay, but child processes must not inherit it."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(scope="session")
def ml1m_dir() -> Path:
    """Folder of ML-1M's released split as Parquet; dependent tests are skipped without it."""
    folder = Path(os.environ.get("COLLM_ML1M_DIR", ML1M_PLACE))
    if not (folder / "interactions.parquet").exists():
        pytest.skip("needs ML-1M's released split as Parquet: set COLLM_ML1M_DIR to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with its tokenizer, for ``llm.backbone``."""
    # Late: transformers takes seconds to import.
    from tests.tiny import save_backbone

    return save_backbone(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ratings.csv (user_id,item_id,rating,timestamp; about 1,400 rows, time-ordered) and items.csv.

    60 users rate 80 items; ratings depend on user and item, so there is a signal to learn. Titles contain
    commas, quotes and characters outside ASCII.
    """
    folder = tmp_path_factory.mktemp("ratings")
    write_ratings(folder / "ratings.csv")
    write_items(folder / "items.csv")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_ratings: Path, tiny_backbone_dir: Path) -> Path:
    """Run directory of a complete pipeline on the tiny ratings. Read-only."""
    return _build_ratings_run(tmp_path_factory.mktemp("finished"), tiny_ratings, tiny_backbone_dir)


@pytest.fixture(scope="session")
def anchored_run(tmp_path_factory: pytest.TempPathFactory, tiny_ratings: Path, tiny_backbone_dir: Path) -> Path:
    """Run directory of a complete pipeline on the tiny ratings, with an anchor of all simple scores. Read-only."""
    # One stage with the language model's own loss and one without; both end with a gain, as this anchor is weak.
    anchor = ("anchor.kind=blend", "anchor.recent_share=1", "promotion.baseline=anchor")
    losses = ("stage1.llm_loss_weight=null", "stage2.llm_loss_weight=0.1")
    return _build_ratings_run(tmp_path_factory.mktemp("anchored"), tiny_ratings, tiny_backbone_dir, *anchor, *losses)


def _build_ratings_run(folder: Path, ratings: Path, backbone: Path, *settings: str) -> Path:
    # Late: the pipeline's libraries take seconds to import.
    from tests.integration.finished_run import build_run

    overrides = [
        f"run.dir={folder / 'run'}",
        f"dataset.path={ratings}/ratings.csv",
        f"dataset.items_path={ratings}/items.csv",
        f"llm.backbone={backbone}",
        "cf.cross_fit=2",
        "evaluation.splits=[valid,test]",
        *settings,
    ]
    return build_run(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)


@pytest.fixture(scope="session")
def finished_clicks_run(tmp_path_factory: pytest.TempPathFactory, tiny_clicks: Path, tiny_backbone_dir: Path) -> Path:
    """Run directory of a complete pipeline on the clicks, with features that ``finished_run`` lacks: sampled negatives,
    target-dependent user vectors, history slots, dropout, and training of the collaborative model. Read-only."""
    from tests.integration.finished_run import build_run

    overrides = [
        f"run.dir={tmp_path_factory.mktemp('finished-clicks') / 'run'}",
        f"dataset.path={tiny_clicks}",
        "dataset.items_path=null",
        "dataset.columns={user_id: user, item_id: item, timestamp: time}",
        "dataset.feedback=implicit",
        "dataset.negatives_per_positive=2",
        f"llm.backbone={tiny_backbone_dir}",
        "cf.model=din",
        "lora.dropout=0.1",
        "mapping.mask_probability=0.2",
        "mapping.tokens_per_slot=2",
        "prompt.stage2=Liked: <ItemTitleList> <ItemIDList>. Like <TargetItemTitle> <TargetItemID>? <UserID> Answer:",
        "stage2.train_cf=true",
        # Of all rows together, unlike the default, which other runs on clicks have.
        "stage1.select_metric=auc",
        "stage2.select_metric=auc",
        "promotion.metric=auc",
    ]
    return build_run(REPOSITORY / "configs" / "tiny_cpu.yaml", overrides)


@pytest.fixture(scope="session")
def tiny_clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 60 clicks: clicks.csv (user,item,time in ISO format) of 10 users on 12 items, no ratings, no titles."""
    path = tmp_path_factory.mktemp("clicks") / "clicks.csv"
    random = np.random.default_rng(5)
    times = np.datetime64("2026-01-01T00:00:00") + np.sort(random.integers(0, 30 * 86400, 60))
    lines = [
        f"u{random.integers(0, 10)},sku-{min(int(random.geometric(0.2)), 12)},{time}" for time in times.astype(str)
    ]
    path.write_text("user,item,time\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_ratings(path: Path, seed: int = 3, rows_per_user: int = 24) -> None:
    """Write ratings that depend on the user's mood, the item's quality and noise."""
    random = np.random.default_rng(seed)
    quality, mood = random.normal(size=NUM_ITEMS), 0.7 * random.normal(size=NUM_USERS)
    events = []
    for user in range(NUM_USERS):
        start = random.integers(0, 200 * 86400)
        for item in random.choice(NUM_ITEMS, rows_per_user, replace=False):
            rating = int(np.clip(round(3.4 + quality[item] + mood[user] + random.normal()), 1, 5))
            events.append((int(start + random.integers(0, 90 * 86400)), user + 1, int(item) + 1, rating))
    events.sort()
    lines = [f"{user},{item},{rating},{1_000_000_000 + time}" for time, user, item, rating in events]
    path.write_text("user_id,item_id,rating,timestamp\n" + "\n".join(lines) + "\n", encoding="utf-8")


def write_items(path: Path) -> None:
    """Write titles, some with special characters."""
    titles = [f"Film {number} ({1960 + number % 40})" for number in range(1, NUM_ITEMS + 1)]
    titles[:4] = ['"Quoted, with commas"', "Amélie — 2001", "<unk> <UserID> [PAD]", "千と千尋の神隠し"]
    quoted = [title.replace('"', '""') for title in titles]
    lines = [f'{number},"{title}"' for number, title in enumerate(quoted, start=1)]
    path.write_text("item_id,title\n" + "\n".join(lines) + "\n", encoding="utf-8")
