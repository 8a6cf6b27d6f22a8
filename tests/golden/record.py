"""Rewrite the golden records: ``python -m tests.golden.record``. Review the differences before you commit them.

The tests write the records with the code that compares them. The run of release 0.1 stays unchanged.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.golden.records import FOLDER, RECORD_VARIABLE


def main() -> int:
    """Run the tests in the mode that writes; returns pytest's exit code."""
    os.environ[RECORD_VARIABLE] = "1"
    return int(pytest.main(["-q", str(FOLDER / "test_golden.py")]))


if __name__ == "__main__":
    sys.exit(main())
