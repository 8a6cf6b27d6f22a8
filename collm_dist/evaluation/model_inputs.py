"""Training labels and inputs of a model in words: two columns of the report's table."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Flag, auto

from collm_dist.anchor import AnchorKind
from collm_dist.config import CfConfig


class Inputs(Flag):
    """Inputs of a model.

    Attributes:
        IDS: vectors, tokens or biases of single users or items.
        LIKES, DISLIKES: items that the user liked or disliked before the row.
        COUNTS: how often user and item occurred and were liked before the row, in the rows of all users.
        ITEM_TEXTS: the text of the target.
        USER_TEXTS: the text of the user.
    """

    IDS = auto()
    LIKES = auto()
    DISLIKES = auto()
    COUNTS = auto()
    ITEM_TEXTS = auto()
    USER_TEXTS = auto()


_OF_FIELDS: dict[str, Inputs] = {
    "<ItemTitleList>": Inputs.LIKES,
    "<DislikedTitleList>": Inputs.DISLIKES,
    "<RatedTitleList>": Inputs.LIKES | Inputs.DISLIKES,
    "<UserText>": Inputs.USER_TEXTS,
    "<TargetItemTitle>": Inputs.ITEM_TEXTS,
    "<UserID>": Inputs.IDS | Inputs.LIKES,  # vectors of new users come from their likes
    "<ItemIDList>": Inputs.IDS | Inputs.LIKES,
    "<TargetItemID>": Inputs.IDS,
    "<MatchID>": Inputs.COUNTS,
}


def list_field_inputs(fields: Iterable[str], cf: CfConfig) -> Inputs:
    """Return the inputs behind fields of a prompt; ids without a collaborative model say nothing of likes."""
    inputs = Inputs(0)
    for field in fields:
        inputs |= Inputs.IDS if (field, cf.model) == ("<UserID>", "none") else _OF_FIELDS[field]
    return inputs


def list_cf_inputs(cf: CfConfig) -> Inputs:
    """Return the inputs of the collaborative model's score."""
    return Inputs.IDS | Inputs.LIKES | (Inputs.COUNTS if cf.feedback == "all" else Inputs(0))


def list_anchor_inputs(kind: AnchorKind | None, cf: CfConfig) -> Inputs:
    """Return the inputs of an anchor."""
    if kind is None:
        return Inputs(0)
    return list_cf_inputs(cf) if kind == "cf" else Inputs.COUNTS


def describe_inputs(inputs: Inputs, feedback: str) -> str:
    """Return the entry of the column ``inputs``: only models with equal entries compete.

    Counts cover all feedback before the row, so nothing is named beside them but texts of users. The target's text is
    named where neither counts nor a history is read.
    """
    parts = []
    if feedback == "implicit":
        inputs &= ~Inputs.DISLIKES  # users' histories have none
    if Inputs.COUNTS in inputs:
        parts.append("all earlier feedback" if feedback == "explicit" else "all earlier likes")
    else:
        if Inputs.IDS in inputs:
            parts.append("ids")
        history = [name for flag, name in ((Inputs.LIKES, "likes"), (Inputs.DISLIKES, "dislikes")) if flag in inputs]
        if history:
            parts.append(f"earlier {' and '.join(history)}")
        elif Inputs.ITEM_TEXTS in inputs:
            parts.append("item texts")
    if Inputs.USER_TEXTS in inputs:
        parts.append("user texts")
    return "ids alone" if parts == ["ids"] else ", ".join(parts)


def describe_labels(feedback: str) -> str:
    """Return the entry of the column ``training labels`` of a model that is fitted to all training rows."""
    return "all feedback" if feedback == "explicit" else "likes, sampled dislikes"
