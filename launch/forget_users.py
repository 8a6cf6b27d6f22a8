"""Remove runs with given users: ``python launch/forget_users.py --users users.parquet --runs runs/* [--apply]``."""

from __future__ import annotations

import sys

from collm_dist.commands.forget_users import main

if __name__ == "__main__":
    sys.exit(main())
