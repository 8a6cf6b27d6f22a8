"""Folder in which the commands of the documentation run: source tree, user data, small settings under usual names.

    ratings.csv items.csv     user data as in the pages: users u1, u2, ..., items B001, B002, ... with titles
    events.csv                clicks and views of the same users
    backbone/                 a language model with random weights, two layers deep
    configs/                  the project's configurations, shrunk where they are meant for user data

The commands run verbatim; the files that they name make them fast.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import yaml

from tests.conftest import write_items, write_ratings
from tests.doc_blocks import ROOT, Block

# Sections that the tests' experiment does not override.
OWN_SECTIONS = ("run", "dataset")
LINKED = ("collm_dist", "launch", "benchmarks", "tests", "docs", "Makefile", "mkdocs.yml", "pyproject.toml")
BLOCK_SECONDS = 600
SHOWN_CHARACTERS = 6000


def prepare_folder(folder: Path, backbone: Path, max_rows: int | None = None) -> Path:
    """Create and fill a folder, and return it.

    Args:
        folder: new folder.
        backbone: folder of a tiny language model.
        max_rows: number of earliest rows in ratings.csv; None = all.
    """
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(backbone, folder / "backbone")
    write_own_data(folder, max_rows)
    for name in ("own_ratings", "own_clicks"):
        shrink_config(folder / "configs" / f"{name}.yaml")
    return folder


def write_own_data(folder: Path, max_rows: int | None = None) -> None:
    """Write ratings.csv, items.csv and events.csv, with string ids and ISO timestamps."""
    write_ratings(folder / "ratings.csv")
    write_items(folder / "items.csv")
    start = datetime(2024, 1, 1)
    ratings = [
        {
            "user_id": f"u{row['user_id']}",
            "item_id": _name_item(row["item_id"]),
            "timestamp": (start + timedelta(hours=6 * number)).isoformat(),
            "rating": row["rating"],
        }
        for number, row in enumerate(_read_csv(folder / "ratings.csv"))
    ]
    items = [{"item_id": _name_item(row["item_id"]), "title": row["title"]} for row in _read_csv(folder / "items.csv")]
    events = [
        {"user_id": row["user_id"], "item_id": row["item_id"], "timestamp": row["timestamp"], "event_type": kind}
        for row in ratings
        for kind in (("view", "click") if int(row["rating"]) > 2 else ("view",))
    ]
    _write_csv(folder / "ratings.csv", ratings[:max_rows])
    _write_csv(folder / "items.csv", items)
    _write_csv(folder / "events.csv", events)


def append_ratings(folder: Path, start: int, stop: int) -> None:
    """Append rows of the full log to a shorter ratings.csv, as on the next day."""
    whole = folder.parent / f"{folder.name}-whole"
    whole.mkdir()
    write_own_data(whole)
    rows = (whole / "ratings.csv").read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    with (folder / "ratings.csv").open("a", encoding="utf-8") as file:
        file.writelines(rows[start:stop])


def shrink_config(path: Path) -> None:
    """Merge the sizes of the tests' experiment and the tiny backbone into a configuration."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    tiny = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text(encoding="utf-8"))
    for name, section in tiny.items():
        if name not in OWN_SECTIONS:
            own[name] = {**section, **own.get(name, {})}
    own["llm"]["backbone"] = "backbone"
    own["cf"]["cross_fit"] = 2
    path.write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")


def run_block(block: Block, folder: Path) -> str:
    """Run a block in a prepared folder, or save it if it is a file, and return its output.

    Processes that it leaves behind are terminated.

    Raises:
        AssertionError: the block failed or timed out; the message has place, text and output.
    """
    if block.title is not None:
        target = folder / block.title
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text, encoding="utf-8")
        return ""
    shell, python = ["bash", "-euo", "pipefail", "-c"], [sys.executable, "-c"]
    command = [*(shell if block.language == "bash" else python), block.text]
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    output = folder / ".output"
    with output.open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | paths, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = f"exit code {process.wait(BLOCK_SECONDS)}"
        except subprocess.TimeoutExpired:
            ended = f"no end after {BLOCK_SECONDS} seconds"
        finally:
            _end_group(process)
    printed = output.read_text(encoding="utf-8", errors="replace")
    message = f"{block.place}: {ended}\n--- the block\n{block.text}--- its output\n{printed[-SHOWN_CHARACTERS:]}"
    assert ended == "exit code 0", message
    return printed


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Terminate the process group of a block: SIGTERM, then SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(100):
            process.poll()  # an ended process stays in the group until it is reaped
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _name_item(number: str) -> str:
    return f"B{int(number):03d}"


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
