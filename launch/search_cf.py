"""Search for the collaborative model's settings: ``python launch/search_cf.py --config C``."""

from __future__ import annotations

import sys

from collm_dist.commands.search_cf import main

if __name__ == "__main__":
    sys.exit(main())
