"""Settings of the run directory."""

from __future__ import annotations

from pydantic import Field

from collm_dist.config.section import Section, Uri, operational


class RunConfig(Section):
    """The run directory, the seed, and where finished steps come from and go to."""

    dir: str = operational(..., "Run directory: every step writes below it. Local or on a shared POSIX file system.")
    seed: int = Field(
        0, ge=0, le=10**9, description="Seed of every random choice: sampling, initialisation, order, bootstrap."
    )
    reuse: tuple[str, ...] = operational(
        (), "Other run directories: their finished steps are linked in if the fingerprints are equal."
    )
    publish_to: Uri | None = operational(
        None,
        "URI (a path, s3://, gs://) to which the pipeline copies every finished step, in a folder named "
        "after the run: missing files only, the step's record last.",
    )
