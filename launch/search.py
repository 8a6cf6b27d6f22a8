"""Search for settings of a step: ``python launch/search.py --config C --step cf|stage1|stage2``."""

from __future__ import annotations

import sys

from collm_dist.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
