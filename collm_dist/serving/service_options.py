"""Options of the ranking service, each a flag of ``launch/serve.py``."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm_dist.errors import RequestError


class ServiceOptions(BaseModel):
    """Where the service listens and what it takes. Nothing here changes a score."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen at; the default is reachable from this machine alone")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    replicas: int | None = Field(
        None,
        ge=1,
        description="models to load, one to a device; by default one to each GPU, or without one to each node",
    )
    max_batch_size: int = Field(32, ge=1, description="most requests scored in one pass; 1 turns batching off")
    batch_wait_ms: float = Field(
        2, ge=0, le=1000, description="how long an idle device waits for a second request before it scores the first"
    )
    max_candidates: int = Field(1000, ge=1, description="most candidates of a request, given or to be retrieved")
    max_history: int = Field(1000, ge=1, description="most items in a request's history")
    max_body_kib: int = Field(256, ge=1, description="most KiB of a request's body")
    max_waiting: int = Field(
        64, ge=1, description="most requests that wait at a replica; more are answered 503, to be tried again"
    )
    request_timeout_s: float = Field(60, gt=0, description="seconds after which a request is given up with 504")
    shutdown_timeout_s: float = Field(
        60, gt=0, description="how long a stop waits for requests that are being answered"
    )


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option."""
    for name, field in ServiceOptions.model_fields.items():
        default = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(
            _spell_flag(name), dest=name, metavar="X", default=field.default, help=f"{field.description}{default}"
        )


def read_options(arguments: argparse.Namespace) -> ServiceOptions:
    """Return the options of a command line.

    Raises:
        RequestError: one is out of range; the message names all of them.
    """
    values: dict[str, Any] = {name: getattr(arguments, name) for name in ServiceOptions.model_fields}
    try:
        return ServiceOptions(**values)
    except ValidationError as error:
        mistakes = [
            f"{_spell_flag(str(mistake['loc'][0]))} {mistake['input']}: {mistake['msg']}" for mistake in error.errors()
        ]
        raise RequestError("; ".join(mistakes)) from None


def _spell_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
