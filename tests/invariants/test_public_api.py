"""The public API changes only on purpose."""

import json

from tests.invariants.record_public_api import PATH, collect

REMEDY = (
    "the public API differs from public_api.json; if that is intended, say so in CHANGELOG.md and run "
    "python -m tests.invariants.record_public_api"
)


def test_the_public_api_is_the_recorded_one():
    recorded, found = json.loads(PATH.read_text(encoding="utf-8")), json.loads(json.dumps(collect()))
    for part in recorded:
        assert found[part] == recorded[part], REMEDY
    assert found.keys() == recorded.keys()
