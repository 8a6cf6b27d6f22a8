"""Item texts: a template over item columns, with fixed rules for cleaning."""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from collm_dist.data.ingest.file_format import BadRows
from collm_dist.data.ingest.normalize import to_ids, to_text
from collm_dist.errors import ConfigError
from collm_dist.phases import follow

# With invisible or direction-changing characters a title prints as one thing and tokenizes as another; variation
# selectors and tag characters can hide a whole text.
_INVISIBLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]+"
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Known tags alone: other text in angle brackets may belong to a title.
_TAG = re.compile(
    r"<(script|style)\b[^<>]*>.*?</\1\s*>|</?(?:a|abbr|b|big|blockquote|body|br|button|center|code|dd|div|dl|dt|em|font|form|"
    r"h[1-6]|head|hr|html|i|iframe|img|input|label|li|link|meta|ol|option|p|pre|s|script|select|small|span|strike|strong|"
    r"style|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|wbr)(?:\s[^<>]*)?/?>|<!--.*?-->",
    re.IGNORECASE | re.DOTALL,
)
_SPACES = re.compile(r"\s+")
MAX_TEXT_CHARACTERS = 1000
WITHOUT_ID = "items without an id"
UNDECODED_TITLES = "titles with bytes that do not fit the encoding (dataset.encoding)"


@dataclass(frozen=True)
class ItemCatalogue:
    """The items of a source.

    Attributes:
        table: ``item_id, title, text`` of each item, and its times of ``WINDOW_COLUMNS`` if the settings name them.
        repairs: numbers of repaired rows by cause.
        rows_read: number of rows of the files, without lines that do not parse.
        bad_rows: rows that cannot be used.
    """

    table: Any
    repairs: Counter[str]
    rows_read: int
    bad_rows: BadRows

    @property
    def mended(self) -> dict[str, int]:
        """The repairs without the rows that cannot be used."""
        lost = {WITHOUT_ID, *(f"item rows: {cause}" for cause in self.bad_rows.counts)}
        return {cause: count for cause, count in self.repairs.items() if cause not in lost}


def clean_text(text: str | None) -> str:
    """Return a text in NFC on one line without HTML, control, invisible and direction characters, cut to maximum size.

    Entities are decoded and tags left out, again and again: catalogues also escape twice.
    """
    cleaned = _clean_once((text or "")[: 4 * MAX_TEXT_CHARACTERS])
    while has_html(cleaned) and (shorter := _clean_once(cleaned)) != cleaned:
        cleaned = shorter
    return cleaned[:MAX_TEXT_CHARACTERS]


def has_html(text: str) -> bool:
    """Return whether a text has HTML entities or tags."""
    return ("&" in text and _ENTITY.search(text) is not None) or ("<" in text and _TAG.search(text) is not None)


def _clean_once(text: str) -> str:
    if has_html(text):
        text = _TAG.sub(" ", _ENTITY.sub(lambda match: html.unescape(match.group()), text))
    return _SPACES.sub(" ", _INVISIBLE.sub(" ", unicodedata.normalize("NFC", text))).strip()


def list_template_columns(template: str, key: str = "dataset.item_text") -> list[str]:
    """Return the names of the columns in a template.

    Args:
        template: a text with column names in braces.
        key: its setting, for messages.

    Raises:
        ConfigError: the braces do not parse.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{key}: '{template}' does not parse: {error}") from None
    bad = [name for name in fields if not re.fullmatch(r"[\w:\- ]+", name)]
    if bad or not fields:
        example = "{title}" if key == "dataset.item_text" else "{age}, {city}"
        raise ConfigError(f"{key}: '{template}' needs column names in braces, for example '{example}'")
    return fields


def build_item_table(
    tables: Iterable[tuple[Any, Mapping[str, Any]]], id_column: str, title_column: str, template: str
) -> tuple[Any, Counter[str]]:
    """Return a table ``item_id, title, text`` from the first row of each item, and counts of repairs by cause.

    Args:
        tables: raw item rows, consumed one by one, so memory is bounded by the items, not by the files; and for each
            the further int64 columns that the result has, the same for all.
        id_column, title_column: names of these columns.
        template: item text; ``{title}`` stands for the title column, whatever its name.
    """
    counts: Counter[str] = Counter()
    columns = {name: title_column if name == "title" else name for name in list_template_columns(template)}
    rows: dict[str, tuple[str, str]] = {}
    windows: dict[str, dict[str, int | None]] = {}
    for table, window_columns in follow(tables, "reading items", "blocks"):
        ids = to_ids(table.column(id_column)).to_pylist()
        raw_titles = to_text(table.column(title_column)).to_pylist()
        values = {name: to_text(table.column(column)).to_pylist() for name, column in columns.items()}
        times = {name: column.to_pylist() for name, column in window_columns.items()}
        windows = windows or {name: {} for name in times}
        for position, item_id in enumerate(ids):
            if not item_id:
                counts[WITHOUT_ID] += 1
                continue
            title = clean_text(raw_titles[position])
            text = clean_text(
                fill_template(template, {name: clean_text(column[position]) for name, column in values.items()})
            )
            row = (title or item_id, text or item_id)
            if item_id in rows:
                counts["rows of an item with another text"] += rows[item_id] != row
                differ = any(windows[name][item_id] != column[position] for name, column in times.items())
                counts["rows of an item with other times of availability"] += differ
                continue
            rows[item_id] = row
            for name, column in times.items():
                windows[name][item_id] = column[position]
            counts["items without a text"] += not text
            counts["titles with HTML entities or tags"] += has_html(raw_titles[position] or "")
            counts["titles with invisible characters"] += bool(_INVISIBLE.search(raw_titles[position] or ""))
            counts[UNDECODED_TITLES] += "\ufffd" in (raw_titles[position] or "")
            counts[f"titles cut at {MAX_TEXT_CHARACTERS} characters"] += len(title) == MAX_TEXT_CHARACTERS
    return pa.table(
        {
            "item_id": pa.array(rows.keys(), pa.string()),
            "title": pa.array([title for title, _ in rows.values()], pa.string()),
            "text": pa.array([text for _, text in rows.values()], pa.string()),
            **{name: pa.array(column.values(), pa.int64()) for name, column in windows.items()},
        }
    ), +counts


def fill_template(template: str, values: dict[str, str]) -> str:
    """Fill a template by plain replacement; ``str.format`` would also evaluate attributes and indices."""
    return re.sub(r"\{([^{}]*)\}", lambda match: values[match.group(1)], template)
