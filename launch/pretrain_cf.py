"""Train the collaborative model: ``python launch/pretrain_cf.py --config C``."""

from __future__ import annotations

import sys

from collm_dist.commands.pretrain_cf import main

if __name__ == "__main__":
    sys.exit(main())
