"""Serve rankings over HTTP: ``python launch/serve.py --config C``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from collm_dist.cli import add_stage1_argument, add_trust_argument, run_command
from collm_dist.config import Config
from collm_dist.runs.run_dir import RunDir
from collm_dist.serving.service_options import add_option_arguments, read_options

EXAMPLES = """examples:
  python launch/serve.py --config runs/mine/config.yaml
  curl -H 'content-type: application/json' -d '{"history": ["B004", "B011"], "top_k": 5}' http://127.0.0.1:8000/rank

exposing it:
  The service listens on the loopback address, where all users of this machine may ask. With --host 0.0.0.0 it is
  reachable from the network and demands a token: set COLLM_DIST_TOKEN, and send 'Authorization: Bearer TOKEN'. It has
  no TLS, so put a proxy with TLS in front. Ray opens further ports on the machine's address; keep them behind a
  firewall.
"""


def _run(config: Config, arguments: argparse.Namespace) -> None:
    options = read_options(arguments)
    from collm_dist.orchestration.service import run_service

    run_service(
        config,
        RunDir(Path(config.run.dir)),
        options,
        pointer=_find_pointer(config, Path(arguments.config_path)),
        overrides=[override for override in arguments.overrides if not override.startswith("run.dir=")],
        trust_code=arguments.trust_code,
        accept_stage1=arguments.accept_stage_1,
    )


def _find_pointer(config: Config, config_path: Path) -> Path | None:
    """Return the link by which the run was named: ``run.dir``, or the folder of its config.yaml; None without one."""
    run_dir, folder = Path(config.run.dir), config_path.absolute().parent
    for link in (run_dir, folder):
        if link.is_symlink() and link.resolve() == run_dir.resolve():
            return link
    return None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_option_arguments(parser)
    add_trust_argument(parser)
    add_stage1_argument(parser)


def main() -> int:
    """Run the command and return its exit code."""
    return run_command("Serve a finished run over HTTP, on Ray Serve.", _run, EXAMPLES, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
