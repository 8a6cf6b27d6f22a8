"""Evaluate a run: ``deepspeed launch/evaluate_model.py --config C``, or plain ``python``."""

from __future__ import annotations

from collm_dist.cli import end_process
from collm_dist.commands.evaluate_model import main

if __name__ == "__main__":
    end_process(main())
