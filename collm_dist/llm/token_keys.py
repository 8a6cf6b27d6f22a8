"""Keys of tokens: equal keys mean equal input embeddings, under the weights of one model.

Shapes: P tokens, S slots of K tokens each, E width of a vector.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def key_tokens(ids: Tensor, places: Tensor, vectors: Tensor | None, tokens_per_slot: int) -> NDArray[np.int64]:
    """Return the (P, 2) int64 keys of tokens, on the host.

    A token's key is its id and 0. The key of a soft token is the 128-bit hash of the vector in its slot and of its
    number within the slot; the second half is odd, so it never equals the key of an id.

    Args:
        ids: (P,) token ids, any in slots.
        places: (S,) first token of each slot; slots beyond the P tokens are ignored.
        vectors: (S, E) inputs of the mapping; None without slots.
        tokens_per_slot: K.
    """
    keys = np.zeros((len(ids), 2), np.int64)
    keys[:, 0] = ids.cpu().numpy()
    if vectors is None:
        return keys
    inside = places < len(ids)
    rows = vectors[inside].double().cpu().numpy()  # exact for every type
    for place, row in zip(places[inside].tolist(), rows, strict=True):
        content = row.tobytes()
        for number in range(tokens_per_slot):
            digest = hashlib.blake2b(content, digest_size=16, salt=number.to_bytes(8, "little")).digest()
            keys[place + number] = np.frombuffer(digest, np.int64)
            keys[place + number, 1] |= 1
    return keys
