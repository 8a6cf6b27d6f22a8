"""What all config sections share: they are closed, frozen, and every field says what it means."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of settings. Unknown keys and infinite numbers are refused; values cannot change once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes how the work is done, never what comes out.

    Such fields are no part of a step's fingerprint: changing one does not make finished work stale.
    """
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)
