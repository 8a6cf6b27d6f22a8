"""Run every step of an experiment: ``python launch/run_pipeline.py --config C``, also under ``ray job submit``."""

from __future__ import annotations

import sys

from collm_dist.commands.run_pipeline import main

if __name__ == "__main__":
    sys.exit(main())
