"""Turn raw logs into samples and shards: ``python launch/preprocess_data.py --config C``."""

from __future__ import annotations

import sys

from collm_dist.commands.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
