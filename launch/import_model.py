"""Make a run directory from an export: ``python launch/import_model.py --input DIR --run-dir R``."""

from __future__ import annotations

import sys

from collm_dist.commands.import_model import main

if __name__ == "__main__":
    sys.exit(main())
