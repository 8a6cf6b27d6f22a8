"""Export a finished run: ``python launch/export_model.py --config C --output DIR [--push-to-hub OWNER/NAME]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import run_command
from collm_dist.config import Config
from collm_dist.errors import ConfigError
from collm_dist.runs.run_dir import RunDir

EXAMPLES = """examples:
  python launch/export_model.py --config C --output exported --license apache-2.0 --data-license "internal use"
  python launch/export_model.py --config C --output exported --without-events
  HF_TOKEN=... python launch/export_model.py --config C --output exported --push-to-hub OWNER/NAME
  python launch/export_model.py --config C --output exported --without-events --push-to-hub OWNER/NAME --public

The folder has a LoRA adapter for plain peft (not with lora.rank: full), the tuned model for plain transformers, the
mapping and the collaborative models (safetensors), ids, titles, the log, prompts and a model card.
launch/import_model.py makes a run directory from it that gives the same scores.

The log contains users' events: consider who receives the folder. With --without-events no user id, event, text or
vector of a user is in it. It then ranks for new users, whose history the request gives, and refuses others.

--push-to-hub uploads the folder to a repository of the Hugging Face Hub and replaces its contents. The repository is
private unless you add --public. The token comes from HF_TOKEN or from: hf auth login. If the upload breaks off, the
same command again uploads the folder that is there. HF_ENDPOINT names another server.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from collm_dist.serving.licences import NOT_STATED

    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    for name, part in (("license", "the model"), ("backbone-license", "the backbone"), ("data-license", "the data")):
        parser.add_argument(f"--{name}", default=NOT_STATED, metavar="TEXT", help=f"licence of {part}, for the card")
    parser.add_argument(
        "--without-events", action="store_true", help="leave out ids, events, texts and vectors of users"
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="repository of the Hub that gets the export")
    parser.add_argument("--public", action="store_true", help="the repository is public; default: private")
    parser.add_argument(
        "--publish-events", action="store_true", help="allow a public repository with users' ids and events"
    )


def _run(config: Config, arguments: argparse.Namespace) -> None:
    from collm_dist.data.shards.manifest import load_manifest
    from collm_dist.serving.export import check_export, export_model
    from collm_dist.serving.hub import HubTarget, prepare_repo, push_export
    from collm_dist.serving.licences import Licences

    run_dir, folder, repo = RunDir(Path(config.run.dir)), arguments.output, arguments.push_to_hub
    licences = Licences(arguments.license, arguments.backbone_license, arguments.data_license)
    with_events = not arguments.without_events and load_manifest(run_dir.step_dir("data")).has_events
    if repo is None:
        if arguments.public or arguments.publish_events:
            raise ConfigError("--public and --publish-events apply only to a push: add --push-to-hub OWNER/NAME")
        print(export_model(config, run_dir, folder, licences, with_events=with_events))
        return
    is_there = check_export(folder, run_dir, licences, with_events=with_events)  # left by an upload that broke off
    target = HubTarget(repo, arguments.public, arguments.publish_events)
    name = prepare_repo(target, with_events=with_events)
    if not is_there:
        export_model(config, run_dir, folder, licences, with_events=with_events)
    print(f"{folder}\n{push_export(folder, name)}")


def main() -> int:
    """Run the command and return its exit code."""
    return run_command("Export a finished run as a folder, and push it to the Hub.", _run, EXAMPLES, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
