"""Item texts: a template over any item columns, cleaned by rule."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collm_dist.data.readers.normalize import to_text
from collm_dist.errors import ConfigError

# Invisible or direction-changing characters would print one thing and tokenize as another.
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")
_SPACES = re.compile(r"\s+")
MAX_TEXT_CHARACTERS = 1000


def clean_text(text: str | None) -> str:
    """Return a text in NFC on one line, without control, invisible and direction characters, of bounded length."""
    visible = _INVISIBLE.sub(" ", unicodedata.normalize("NFC", (text or "")[: 4 * MAX_TEXT_CHARACTERS]))
    return _SPACES.sub(" ", visible).strip()[:MAX_TEXT_CHARACTERS]


def list_template_columns(template: str) -> list[str]:
    """Return the columns that an item-text template names.

    Raises:
        ConfigError: the braces do not parse.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"dataset.item_text: '{template}' does not parse: {error}") from None
    bad = [name for name in fields if not re.fullmatch(r"[\w:\- ]+", name)]
    if bad or not fields:
        raise ConfigError(f"dataset.item_text: '{template}' needs column names in braces, for example '{{title}}'")
    return fields


def build_item_table(
    tables: Iterable[Any], id_column: str, title_column: str, template: str
) -> tuple[Any, Counter[str]]:
    """Return ``item_id, title, text`` of every item, the first row of an id counting, and what was mended.

    Args:
        tables: raw item rows.
        id_column, title_column: names in them.
        template: item text; ``{title}`` is the title column whatever it is called.
    """
    raw = pa.concat_tables(list(tables), promote_options="permissive")
    counts: Counter[str] = Counter()
    ids = pc.utf8_trim_whitespace(to_text(raw.column(id_column)))
    titles = [clean_text(one) for one in to_text(raw.column(title_column)).to_pylist()]
    names = list_template_columns(template)
    columns = {
        name: titles if name == "title" else [clean_text(v) for v in to_text(raw.column(name)).to_pylist()]
        for name in names
    }
    rows: dict[str, tuple[str, str]] = {}
    for position, item_id in enumerate(ids.to_pylist()):
        if not item_id:
            counts["items without an id"] += 1
            continue
        if item_id in rows:
            counts["repeated items"] += 1
            continue
        text = clean_text(_fill(template, {name: values[position] for name, values in columns.items()}))
        counts["items without a text"] += not text
        rows[item_id] = (titles[position] or item_id, text or item_id)
    return pa.table(
        {
            "item_id": pa.array(rows.keys(), pa.string()),
            "title": pa.array([title for title, _ in rows.values()], pa.string()),
            "text": pa.array([text for _, text in rows.values()], pa.string()),
        }
    ), counts


def _fill(template: str, values: dict[str, str]) -> str:
    """Fill a template by plain replacement: format() would follow attributes and indices."""
    return re.sub(r"\{([^{}]*)\}", lambda match: values[match.group(1)], template)
