"""The base of all sections of the configuration, and what their fields share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A group of settings: immutable, without unknown keys and infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_as_1(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is expected, which pydantic reads as 1 and 0."""
        if any(isinstance(entry, bool) for entry in (value if isinstance(value, list | tuple) else [value])):
            types = _list_types(cls.model_fields[str(info.field_name)].annotation)
            if types & {int, float} and not types & {bool, Any}:
                raise ValueError("should be a number, not true or false")
        return value


def _list_types(annotation: Any) -> set[Any]:
    """Return the types in an annotation; for a Literal, those of its values."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return {annotation}.union(*map(_list_types, get_args(annotation)))


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """Return a field that changes how the work is done, never its results.

    A step's fingerprint leaves such fields out: changing one does not make finished work stale.
    """
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def optional(description: str, **constraints: Any) -> Any:
    """Return a field that is None by default, and was added after release 0.1.

    While it is None, fingerprints leave it out: runs that were finished before the setting existed stay current.
    """
    return Field(None, description=description, json_schema_extra={"optional": True}, **constraints)


# A user with a password, which may contain a slash. A port after the host is not a password. Over HTTP, a user name
# alone may be a token.
_SECRET_IN_ADDRESS = re.compile(
    r"[a-z][\w+.-]*://([^/?#@]*:[^/?#@]*@|[^/?#@\[\]]*:(?!\d*(?:[/?#]|$))[^?#]*@)|https?://[^/?#]*@", re.IGNORECASE
)
_SECRET_IN_OPTIONS = re.compile(
    r"[?&;][\w.%-]*(secret|passw(or)?d|pwd|token|signature|credential|(access|account|api|private|shared)[\w-]*key(id)?)"
    r"[\w-]*=|[?&;](sig|sas|key|auth)=",
    re.IGNORECASE,
)


def holds_credentials(uri: str) -> bool:
    """Return whether a URI has a password, token, key or signature in its address or its options."""
    return bool(_SECRET_IN_ADDRESS.match(uri) or _SECRET_IN_OPTIONS.search(uri))


def _refuse_credentials(uri: str) -> str:
    if holds_credentials(uri):
        raise ValueError(
            "credentials in a URI would be written to records and logs: set them in the environment instead "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return uri


# A path or URI; credentials come from the environment.
Uri = Annotated[str, AfterValidator(_refuse_credentials)]
