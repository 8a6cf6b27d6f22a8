"""Export a finished run: ``python launch/export_model.py --config C --output DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/export_model.py --config C --output exported --license apache-2.0 --data-license "internal use"

The folder has a LoRA adapter for plain peft, the merged model for plain transformers, the mapping and the
collaborative models (safetensors), ids, titles, the log, prompts and a model card. launch/import_model.py makes a run
directory from it that gives the same scores. The log contains users' events: consider who receives the folder.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    for name, part in (("license", "the model"), ("backbone-license", "the backbone"), ("data-license", "the data")):
        parser.add_argument(f"--{name}", default="not stated", metavar="TEXT", help=f"licence of {part}, for the card")


def _run(config: Config, arguments: argparse.Namespace) -> None:
    from collm_dist.serving.export import export_model
    from collm_dist.serving.model_card import Licences

    licences = Licences(arguments.license, arguments.backbone_license, arguments.data_license)
    print(export_model(config, RunDir(Path(config.run.dir)), arguments.output, licences))


def main() -> int:
    """Run the command and return its exit code."""
    return run_command("Export a finished run as a folder.", _run, EXAMPLES, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
