"""Serve rankings over HTTP: ``python launch/serve.py --config C``."""

from __future__ import annotations

import sys

from collm_dist.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
