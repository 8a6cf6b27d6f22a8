"""Token ids of item and user texts in memory-mapped tables, tokenized once per backbone: loaders never tokenize."""

from __future__ import annotations

import hashlib
import logging
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collm_dist.data.prompts.ragged import Ragged
from collm_dist.data.shards.context_block import IntArray
from collm_dist.phases import show_phase
from collm_dist.runs.atomic_files import open_atomic

logger = logging.getLogger(__name__)

_BATCH = 10_000
_HEADER = 2  # checksum of the rest, number of cut texts


@dataclass(frozen=True)
class TextTokens:
    """Token ids of texts.

    Attributes:
        offsets: (number of texts + 1,).
        ids: token ids of text i are ``ids[offsets[i]:offsets[i + 1]]``.
        num_cut: number of cut texts.
    """

    offsets: IntArray
    ids: IntArray
    num_cut: int

    def to_ragged(self) -> Ragged:
        """Return the texts as rows."""
        return Ragged(np.asarray(self.offsets), np.asarray(self.ids))


def load_item_tokens(folder: Path, texts: Sequence[str], tokenizer: Any, max_tokens: int) -> TextTokens:
    """Return the table of these texts in quotes; it is built if the file is missing or damaged.

    Args:
        folder: cache folder, with one table per combination of texts, tokenizer and limit.
        texts: item texts in the order of their indices.
        tokenizer: tokenizer of the backbone.
        max_tokens: longer texts are cut, not counting the quotes.
    """
    return _load_tokens(folder, "item", texts, tokenizer, max_tokens)


def load_user_tokens(
    folder: Path, texts: Sequence[str | None], unknown: str, tokenizer: Any, max_tokens: int
) -> TextTokens:
    """Return the table of these texts without quotes, and of ``unknown`` as its last text.

    Args:
        folder, tokenizer, max_tokens: see ``load_item_tokens``.
        texts: user texts in the order of their indices; None = ``unknown``.
        unknown: text of a user without a text.
    """
    filled = [unknown if text is None else text for text in (*texts, None)]
    return _load_tokens(folder, "user", filled, tokenizer, max_tokens)


def _load_tokens(folder: Path, kind: str, texts: Sequence[str], tokenizer: Any, max_tokens: int) -> TextTokens:
    digest = hashlib.sha256(f"with checksum\n{_describe(tokenizer)}\n{max_tokens}\n".encode())
    for text in texts:
        digest.update(text.encode(errors="replace") + b"\x00")
    path = folder / f"{kind}-tokens-{digest.hexdigest()[:16]}.npy"
    if (table := _open_table(path)) is None:
        with open_atomic(path, "wb") as file:
            np.save(file, _tokenize(texts, tokenizer, max_tokens, '"' if kind == "item" else ""))
        table = np.load(path, mmap_mode="r")
    ends = _HEADER + len(texts) + 1
    return TextTokens(offsets=table[_HEADER:ends], ids=table[ends:], num_cut=int(table[1]))


def _open_table(path: Path) -> IntArray | None:
    """Return the memory-mapped table of a file, or None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        table: IntArray = np.load(path, mmap_mode="r")
        if (
            table.ndim == 1
            and table.dtype == np.int64
            and len(table) > _HEADER
            and table[0] == zlib.crc32(table[1:].data)
        ):
            return table
    except (ValueError, OSError, EOFError):  # numpy's errors for damaged files
        pass
    logger.warning("%s is damaged; it is rebuilt", path)
    if path.is_dir():
        shutil.rmtree(path)
    return None


def _describe(tokenizer: Any) -> str:
    """Return a string that determines a tokenizer's behaviour, independent of its location."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))


def _tokenize(texts: Sequence[str], tokenizer: Any, max_tokens: int, mark: str) -> IntArray:
    """Return checksum, number of cut texts, offsets and ids in one array; ``mark`` is the quote around a text."""
    quote = tokenizer(mark, add_special_tokens=False)["input_ids"]
    lengths, ids, num_cut = [0], [], 0
    with show_phase("tokenizing texts", len(texts), "texts") as phase:
        for start in range(0, len(texts), _BATCH):
            quoted = [f"{mark}{text}{mark}" for text in texts[start : start + _BATCH]]
            for tokens in tokenizer(quoted, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
                if len(tokens) > max_tokens + 2 * len(quote):
                    tokens, num_cut = [*tokens[: max_tokens + len(quote)], *quote], num_cut + 1
                lengths.append(len(tokens))
                ids.extend(tokens)
            phase.advance(len(quoted))
    table = np.concatenate([[0, num_cut], np.cumsum(lengths), ids]).astype(np.int64)
    table[0] = zlib.crc32(table[1:].data)
    return table
