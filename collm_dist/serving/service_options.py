"""Options of the ranking service, the flags of ``launch/serve.py``."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm_dist.errors import RequestError


class ServiceOptions(BaseModel):
    """Address, limits and timeouts of the service. They do not change scores."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on; the default is reachable from this machine only")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free port")
    replicas: int | None = Field(
        None,
        ge=1,
        description="models to load, one per device; by default one per GPU, or one per node without GPUs",
    )
    max_batch_size: int = Field(32, ge=1, description="maximum number of requests per pass; 1 turns batching off")
    batch_wait_ms: float = Field(
        2,
        ge=0,
        le=1000,
        description="milliseconds that an idle device waits for more requests before it scores the first",
    )
    max_candidates: int = Field(1000, ge=1, description="maximum number of candidates of a request, given or retrieved")
    max_history: int = Field(1000, ge=1, description="maximum number of items in a request's history")
    max_body_kib: int = Field(256, ge=1, description="maximum size of a request body in KiB")
    max_waiting: int = Field(
        64, ge=1, description="maximum number of waiting requests per replica; further requests are answered 503"
    )
    max_requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="maximum number of requests per minute from a client address, else 429; by default no limit",
    )
    receive_timeout_s: float = Field(
        10, gt=0, description="seconds within which the headers of a request, and then its body, must arrive; else 408"
    )
    reuse_bytes: int = Field(
        1 << 30,
        ge=0,
        description="bytes per replica, on its device, for cached contexts of users, so that returning users are "
        "ranked faster; 0 disables the cache",
    )
    events: str | None = Field(
        None,
        description="folder, outside of runs and on a disk of this machine, of the events that POST /events receives; "
        "without it none are accepted",
    )
    part_minutes: float = Field(
        60, gt=0, description="age of an event at which the events that have arrived are written to a Parquet part"
    )
    part_rows: int = Field(100_000, ge=1, description="number of waiting events at which a part is written")
    keep_days: float = Field(
        30, gt=0, description="age at which events that all loaded runs have read are deleted, and their ids forgotten"
    )
    follow_every_s: float = Field(
        30, gt=0, description="seconds between checks of the link to the run, if the service was given a link"
    )
    request_timeout_s: float = Field(60, gt=0, description="seconds after which a request is answered 504")
    shutdown_timeout_s: float = Field(60, gt=0, description="seconds that a shutdown waits for requests in progress")


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
        RequestError: an option is out of range; the message lists all such options.
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
