"""The folder that commands of the pages run in: this source tree, own data, small settings under the usual names.

    ratings.csv items.csv     own data as the pages have them: users u1, u2, ..., items B001, B002, ... with titles
    events.csv                clicks and views of the same people
    backbone/                 a language model with random weights, two layers deep
    configs/                  the project's own, but small where they are meant for one's own data

Nothing of a command's text is changed: what makes it fast is in the files that it names.
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

# What the pages' own settings keep, whatever the tests' experiment says.
OWN_SECTIONS = ("run", "dataset")
LINKED = ("collm_dist", "launch", "benchmarks", "tests", "docs", "Makefile", "mkdocs.yml", "pyproject.toml")
BLOCK_SECONDS = 600
SHOWN_CHARACTERS = 6000


def prepare_folder(folder: Path, backbone: Path, max_rows: int | None = None) -> Path:
    """Fill a new folder, which is returned.

    Args:
        folder: new.
        backbone: folder of a tiny language model.
        max_rows: of ratings.csv, the earliest ones.
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
    """Write ratings.csv, items.csv and events.csv, with strings as ids and dates as times."""
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
    """Append these rows of the whole log to a shorter ratings.csv, as the next day does."""
    whole = folder.parent / f"{folder.name}-whole"
    whole.mkdir()
    write_own_data(whole)
    rows = (whole / "ratings.csv").read_text(encoding="utf-8").splitlines(keepends=True)[1:]
    with (folder / "ratings.csv").open("a", encoding="utf-8") as file:
        file.writelines(rows[start:stop])


def shrink_config(path: Path) -> None:
    """Add the sizes of the tests' experiment to a configuration, and the tiny backbone."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    tiny = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text(encoding="utf-8"))
    for name, section in tiny.items():
        if name not in OWN_SECTIONS:
            own[name] = {**section, **own.get(name, {})}
    own["llm"]["backbone"] = "backbone"
    own["cf"]["cross_fit"] = 2
    path.write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")


def run_block(block: Block, folder: Path) -> str:
    """Run a block in a prepared folder, or save it if it is a file, and return what it printed.

    Processes that it leaves behind are ended.

    Raises:
        AssertionError: it ended with an error, or not in time; the message has place, text and output.
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
    """End what a block has started, itself included: politely first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(100):
            process.poll()  # what has ended is a member of the group until somebody asks
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
