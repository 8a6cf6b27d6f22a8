"""Settings of the prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collm_dist.config.section import Section, optional


class PromptConfig(Section):
    """Prompts of the language model, with fields and slots in angle brackets."""

    stage1: str = Field(
        "configs/prompts/stage1.txt",
        description="Prompt of stage 1: a file, or the text itself. Fields: <ItemTitleList> "
        "<DislikedTitleList> <RatedTitleList> <UserText> <TargetItemTitle>.",
    )
    stage2: str = Field(
        "configs/prompts/stage2.txt",
        description="Prompt of stage 2, with the same fields and the slots <UserID> <TargetItemID> <MatchID> "
        "<ItemIDList>.",
    )
    yes: str = Field(" Yes", description="Answer for a like: a single token that differs from the first token of no.")
    no: str = Field(" No", description="Answer for a dislike.")
    score: Literal["yes_minus_no", "yes", "title"] = Field(
        "yes_minus_no",
        description="Score of a like. yes_minus_no: difference of the two answers' logits. yes: the logit of yes alone "
        "(the paper's way). title: how much likelier the history makes the target's title, a tenth of the difference "
        "of its log-likelihoods with and without the history; it knows something before it is tuned, and suits "
        "telling titles (needs cluster.zero_stage 2 or less; with llm.activation_checkpointing, lora.dropout 0).",
    )
    history_length: int = Field(10, ge=0, description="Most recent liked items in the prompt, oldest first.")
    max_title_tokens: int = Field(24, ge=1, description="Longest item text in tokens; longer ones are cut.")
    max_prompt_tokens: int = Field(
        512,
        ge=16,
        description="Longest prompt in tokens; the oldest items of the history are dropped to fit, slots never.",
    )
    empty_history_text: str = Field("(nothing yet)", description="Text in place of an empty history.")
    disliked_length: int | None = optional(
        "Most recent disliked items in a prompt with <DislikedTitleList>, oldest first; default: 5, or as many as "
        "preprocessing stores. They get the room that the history leaves; the oldest are dropped to fit.",
        ge=1,
    )
    empty_dislikes_text: str | None = optional(
        "Text in place of an empty list of dislikes; default: empty_history_text."
    )
    rated_length: int | None = optional(
        "Most recent liked and disliked items in a prompt with <RatedTitleList>, oldest first; default: 10, or as many "
        "as preprocessing stores. They get the room that the history leaves; the oldest are dropped to fit.",
        ge=1,
    )
    rated_marks: tuple[str, str] | None = optional(
        "Texts after a liked and after a disliked title of <RatedTitleList>; default: ' (liked)' and ' (disliked)'."
    )
    max_user_text_tokens: int | None = optional(
        "Longest text of a user in tokens, in a prompt with <UserText>; longer texts are cut. Default: 48.", ge=1
    )
    unknown_user_text: str | None = optional(
        "Text of a user who has none: not in dataset.users_path, or unknown to the run. Default: (not known)."
    )
