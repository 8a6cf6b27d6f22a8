"""Tune the language model: ``deepspeed launch/train.py --config C [--stage 1|2]``; torchrun and python work too."""

from __future__ import annotations

from collm_dist.cli import end_process
from collm_dist.commands.train import main

if __name__ == "__main__":
    end_process(main())
