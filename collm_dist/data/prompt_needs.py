"""Data that the prompts of an experiment require from the data step."""

from __future__ import annotations

from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import FIELDS, load_prompt_text
from collm_dist.errors import ConfigError


def list_prompt_fields(config: Config) -> dict[str, str]:
    """Return the fields in the prompts of the stages that are trained, each with the setting of a prompt that has it.

    Raises:
        ConfigError: a prompt file is missing.
    """
    prompts = {"prompt.stage2": config.prompt.stage2}
    if config.stage1.enabled:
        prompts["prompt.stage1"] = config.prompt.stage1
    texts = {name: load_prompt_text(spec) for name, spec in prompts.items()}
    return {field: name for field in FIELDS for name, text in texts.items() if field in text}


def check_prompt_needs(config: Config) -> bool:
    """Check that the settings give the data that the prompts show.

    Returns:
        Whether a prompt shows the order of likes and dislikes, which shards then have to hold.

    Raises:
        ConfigError: they do not; the message names the prompt, the field and the settings.
    """
    fields = list_prompt_fields(config)
    if "<UserText>" in fields and config.dataset.users_path is None:
        raise ConfigError(
            f"{fields['<UserText>']} has the field <UserText>, which shows texts of users: set dataset.users_path to a "
            "file of users and dataset.user_text to a template over its columns, or use a prompt without the field"
        )
    for field, shown, length in (
        ("<RatedTitleList>", "dislikes too", "prompt.rated_length (10)"),
        ("<DislikedTitleList>", "dislikes", "prompt.disliked_length (5)"),
    ):
        if field in fields and config.preprocessing.max_dislikes == 0:
            raise ConfigError(
                f"preprocessing.max_dislikes=0: {fields[field]} has the field {field}, which shows {shown}; set it to "
                f"at least {length}"
            )
    return "<RatedTitleList>" in fields
