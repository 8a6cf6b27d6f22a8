"""What all config sections share: they are closed, frozen, and every field says what it means."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of settings. Unknown keys and infinite numbers are refused; values cannot change once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes how the work is done, never what comes out.

    Such fields are no part of a step's fingerprint: changing one does not make finished work stale.
    """
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def _refuse_credentials(uri: str) -> str:
    if re.match(r"[a-zA-Z][\w+.-]*://[^/?#@]*:[^/?#@]*@", uri) or re.search(
        r"[?&](access_key|secret_key|password|token)=", uri
    ):
        raise ValueError(
            "a URI with credentials in it would be written into records and logs: take them out and give them in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return uri


# A path or URI; what opens it finds its credentials in the environment.
Uri = Annotated[str, AfterValidator(_refuse_credentials)]
