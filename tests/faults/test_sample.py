"""A seeded sample of the suite of ``make faults``."""

import json
import os
import subprocess
import sys

from tests.distributed.conftest import REPOSITORY, prepared_run  # noqa: F401 (a fixture)
from tests.faults.__main__ import add_chain, load_results, sum_kills
from tests.faults.render import render_faults


def test_nothing_is_lost(prepared_run, tmp_path):  # noqa: F811
    folder, overrides = prepared_run
    command = [sys.executable, "-m", "tests.faults", "--prepared", str(folder), "--results", str(tmp_path / "r.json")]
    command += ["--kinds", "kill", "damage", "--kills", "3", "--others", "1", "--seed", "11", "--overrides", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads((tmp_path / "r.json").read_text())["kinds"]
    assert kinds["kill"]["recovered"] >= 3
    assert all(found["lost"] == 0 for found in kinds.values())
    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert again.stdout == done.stdout  # it resumes where it stopped: nothing is left to do


def test_what_is_lost_is_counted(tmp_path):
    results = load_results(tmp_path / "r.json", seed=3)
    add_chain(results, "kill", {"hits": ["save", "step", "step"], "recovered": True})
    add_chain(results, "kill", {"hits": ["save"], "recovered": False, "code": 1, "output": "..."})
    found = results["kinds"]["kill"]
    assert (found["kill_points"], found["recovered"], found["lost"], found["chains"]) == (4, 3, 1, 2)
    assert found["phases"] == {"save": 2, "step": 2}
    assert found["failures"][0]["chain"] == 1
    assert sum_kills(results) == {"kill_points": 4, "recovered": 3, "lost": 1}
    rows = render_faults(results)
    assert rows[0].endswith("| 4 faults, 3 recovered, 1 lost (2 save, 2 step) |")
    assert all(row.endswith("| not run yet |") for row in rows[1:])
