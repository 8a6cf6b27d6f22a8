"""Turn raw logs into samples and shards: ``python launch/preprocess_data.py --config C``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.runs.forced_redo import track_redo
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.promotion import pin_previous
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/preprocess_data.py --config configs/ml100k_demo.yaml
  python launch/preprocess_data.py --config configs/own_ratings.yaml dataset.path=ratings.csv \\
      dataset.items_path=items.csv run.dir=runs/mine --preview 3
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preview", type=_parse_count, metavar="N", help="show columns, types and N prompts, and stop")


def _parse_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of prompts, 0 or more")
    return int(text)


def _run(config: Config, arguments: argparse.Namespace) -> None:
    run_dir = RunDir(Path(config.run.dir))
    if arguments.preview is not None:
        from collm_dist.data.prompts.prompt_preview import print_preview

        # Late: transformers takes seconds to import, and only the prompts need it.
        def load_tokenizer() -> Any:
            from collm_dist.llm.backbone import load_tokenizer

            llm = config.llm
            return load_tokenizer(llm.backbone, llm.revision, trust_remote_code=llm.trust_remote_code)

        print_preview(config, run_dir, arguments.preview, load_tokenizer)
        return
    from collm_dist.data.accepted_config import accept_config
    from collm_dist.orchestration.preprocess import run_preprocess

    with hold_run_lock(run_dir.path) as is_owner:
        config = pin_previous(config)
        accept_config(config, run_dir, arguments.force, own=["data"])
        with track_redo(run_dir, arguments.force, is_owner=is_owner):
            run_preprocess(config, run_dir, force="data" in arguments.force)


def main() -> int:
    """Run the command and return its exit code."""
    description = "Step 'data', the first: turn raw logs into samples, shards and a manifest, on Ray."
    return run_command(description, _run, EXAMPLES, _add_arguments, steps=["data"])


if __name__ == "__main__":
    sys.exit(main())
