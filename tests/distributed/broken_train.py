"""``launch/train.py`` with one thing wrong: FAULT says what.

nan:<row>     a training row's score is no number
raise:<rank>  a process raises an error of its own in its third training pass
hang:<rank>   a process stands still there
"""

from __future__ import annotations

import itertools
import os
import runpy
import time

import torch

from collm_dist.llm.collm import CollmModel

KIND, _, NUMBER = os.environ["FAULT"].partition(":")
PASSES = itertools.count(1)


def break_down(module, arguments, output):
    if not (isinstance(module, CollmModel) and module.training):
        return None
    if KIND == "nan":
        return output.masked_fill(arguments[0].row_ids == int(NUMBER), torch.nan)
    if next(PASSES) == 3 and os.environ["RANK"] == NUMBER:
        if KIND == "raise":
            raise ValueError("this process alone has a fault")
        time.sleep(3600)
    return None


if __name__ == "__main__":
    torch.nn.modules.module.register_module_forward_hook(break_down)
    runpy.run_path("launch/train.py", run_name="__main__")
