"""Settings of a search for the best settings of a tuning stage."""

from __future__ import annotations

from pydantic import Field, field_validator

from collm_dist.config.cf_search_section import SearchSpace, check_domain
from collm_dist.config.section import Section, operational


class StageSearchConfig(Section):
    """Search for the settings of stage 1 or 2 (launch/search.py). No step reads this section."""

    space: SearchSpace = Field(
        {},
        description="Settings by dotted name, such as stage1.learning_rate or lora.rank, and their domains, as in "
        "cf_search.space. Settings of earlier steps cannot be searched. Default: the learning rate of the stage, log-"
        "uniform from 3e-5 to 3e-3.",
    )
    num_trials: int = Field(
        20, ge=1, description="Number of trials; the first one has the config's own settings if the space holds them."
    )
    grace_validations: int = Field(2, ge=1, description="Validations before ASHA may stop a trial.")
    reduction_factor: int = Field(3, ge=2, description="ASHA keeps one in this many trials at each rung.")
    parallel_trials: int | None = operational(
        None, "Concurrent trials, each in one process; default: one per GPU, or one without GPUs.", ge=1
    )

    @field_validator("space")
    @classmethod
    def _check_space(cls, space: SearchSpace) -> SearchSpace:
        for name, domain in space.items():
            check_domain(name, domain)
        return space
