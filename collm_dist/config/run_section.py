"""Settings of the run directory."""

from __future__ import annotations

from pydantic import Field

from collm_dist.config.section import Section, Uri, operational


class RunConfig(Section):
    """Where results go, and the seed everything is drawn from."""

    dir: str = operational(..., "Run directory: every step writes below it. Local or on a shared POSIX file system.")
    seed: int = Field(
        0, ge=0, le=10**9, description="Seed of every random choice: sampling, initialisation, order, bootstrap."
    )
    reuse: tuple[str, ...] = operational(
        (), "Other run directories whose finished steps are linked in when their fingerprint equals this run's."
    )
    publish_to: Uri | None = operational(
        None,
        "The pipeline copies every finished step to a folder of the run's name below this URI (a path, s3://, gs://): "
        "its record last, and only what is not there yet.",
    )
