"""Write the golden records anew: ``python -m tests.golden.record``. Look at the differences before they are committed.

The tests make them, in the way in which they compare them later. The run of release 0.1 stays as it is.
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
