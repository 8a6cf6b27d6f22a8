"""Settings of the prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collm_dist.config.section import Section


class PromptConfig(Section):
    """The text that the language model reads. Fields and slots are written in angle brackets."""

    stage1: str = Field(
        "configs/prompts/stage1.txt",
        description="Prompt of stage 1: a file, or the text itself. Fields: <ItemTitleList> <TargetItemTitle>.",
    )
    stage2: str = Field(
        "configs/prompts/stage2.txt",
        description="Prompt of stage 2. Also slots: <UserID> <TargetItemID> <MatchID> <ItemIDList>.",
    )
    yes: str = Field(" Yes", description="Answer of a like; one token that differs from the other answer's first.")
    no: str = Field(" No", description="Answer of a dislike.")
    score: Literal["yes_minus_no", "yes"] = Field(
        "yes_minus_no", description="Logit of a like: difference of the answers' logits, or the paper's: yes alone."
    )
    history_length: int = Field(10, ge=0, description="Liked items shown, the last ones, oldest first.")
    max_title_tokens: int = Field(24, ge=1, description="A longer item text is cut at this many tokens.")
    max_prompt_tokens: int = Field(
        512, ge=16, description="Longest prompt; the oldest items of the history are dropped to fit, slots never."
    )
    empty_history_text: str = Field("(nothing yet)", description="Stands for the history of a user without likes.")
