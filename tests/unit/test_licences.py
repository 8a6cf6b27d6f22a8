"""Licences as metadata of the Hub."""

from __future__ import annotations

import pytest

from collm_dist.serving.licences import NOT_STATED, describe_license


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("cc-by-4.0", ['license: "cc-by-4.0"']),
        ("cc-internal", ['license: "other"', 'license_name: "cc-internal"']),
        ("My Own Licence", ['license: "other"', 'license_name: "my-own-licence"']),
        (NOT_STATED, ['license: "unknown"']),
    ],
)
def test_only_identifiers_of_the_hub_are_licences_by_themselves(text, lines):
    assert describe_license(text) == lines
