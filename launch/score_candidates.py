"""Rank candidates: ``python launch/score_candidates.py --config C --input X.parquet --output DIR``."""

from __future__ import annotations

import sys

from collm_dist.commands.score_candidates import main

if __name__ == "__main__":
    sys.exit(main())
