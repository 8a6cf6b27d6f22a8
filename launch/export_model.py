"""Export a finished run: ``python launch/export_model.py --config C --output DIR``."""

from __future__ import annotations

import sys

from collm_dist.commands.export_model import main

if __name__ == "__main__":
    sys.exit(main())
