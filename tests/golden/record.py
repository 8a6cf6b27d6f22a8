"""Rewrite the golden records: ``python -m tests.golden.record``. Review the differences before you commit them.

The tests write the records with the code that compares them. The run of release 0.1 stays unchanged.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.golden.records import FOLDER, RECORD_VARIABLE


def main() -> int:
    """Run the tests in the mode that writes; returns pytest's exit code."""
    # In a process of its own: one thread, as in all tests, must be set before torch is loaded.
    environment = {**os.environ, RECORD_VARIABLE: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER / "test_golden.py")]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
