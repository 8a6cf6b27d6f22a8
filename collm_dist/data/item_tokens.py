"""Item texts as tokens: tokenized once for each backbone into a memory-mapped table, so that no loader tokenizes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collm_dist.artifacts import open_atomic
from collm_dist.data.context_block import IntArray

_BATCH = 10_000


@dataclass(frozen=True)
class ItemTokens:
    """Token ids of every item's quoted text.

    Attributes:
        offsets: (num_items + 1,).
        ids: token ids of item i are ``ids[offsets[i]:offsets[i + 1]]``.
        num_cut: items whose text was cut.
    """

    offsets: IntArray
    ids: IntArray
    num_cut: int


def load_item_tokens(folder: Path, texts: Sequence[str], tokenizer: Any, max_tokens: int) -> ItemTokens:
    """Return the table of these texts, making it the first time.

    Args:
        folder: where tables are kept, one for each combination of texts, tokenizer and limit.
        texts: item texts in the order of their indices.
        tokenizer: of the backbone.
        max_tokens: longer texts are cut, the quotes not counted.
    """
    digest = hashlib.sha256(f"{_describe(tokenizer)}\n{max_tokens}\n".encode())
    for text in texts:
        digest.update(text.encode(errors="replace") + b"\x00")
    path = folder / f"item-tokens-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        with open_atomic(path, "wb") as file:
            np.save(file, _tokenize(texts, tokenizer, max_tokens))
    table = np.load(path, mmap_mode="r")
    count = len(texts)
    return ItemTokens(offsets=table[1 : count + 2], ids=table[count + 2 :], num_cut=int(table[0]))


def _describe(tokenizer: Any) -> str:
    """What a tokenizer does, not where it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))


def _tokenize(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> IntArray:
    """Return number of cut items, offsets and ids as one array."""
    quote = tokenizer('"', add_special_tokens=False)["input_ids"]
    lengths, ids, num_cut = [0], [], 0
    for start in range(0, len(texts), _BATCH):
        quoted = [f'"{text}"' for text in texts[start : start + _BATCH]]
        for tokens in tokenizer(quoted, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            if len(tokens) > max_tokens + 2 * len(quote):
                tokens, num_cut = [*tokens[: max_tokens + len(quote)], *quote], num_cut + 1
            lengths.append(len(tokens))
            ids.extend(tokens)
    return np.concatenate([[num_cut], np.cumsum(lengths), ids]).astype(np.int64)
