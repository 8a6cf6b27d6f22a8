"""``launch/train.py`` with a fault, selected by the variable FAULT.

nan:<row>     the score of a training row is NaN
raise:<rank>  a rank raises an error in its third training pass
hang:<rank>   a rank hangs there
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
            raise ValueError("only this rank has a fault")
        time.sleep(3600)
    return None


if __name__ == "__main__":
    torch.nn.modules.module.register_module_forward_hook(break_down)
    runpy.run_path("launch/train.py", run_name="__main__")
