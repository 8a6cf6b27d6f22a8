"""Item vectors from item texts, for items with few or no training rows.

The texts become TF-IDF vectors, reduced by a truncated SVD (Deerwester et al., "Indexing by latent semantic analysis",
1990). A CF model learns a linear map from these vectors to its item rows.

Shapes: I items, V terms, K width of a text vector, E width of an item vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp  # type: ignore[import-untyped]  # comes with scikit-learn
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

# Single characters are terms too: a title may have no longer word.
_TERM_PATTERN = r"(?u)\b\w+\b"
_MAX_TERMS = 1 << 20


def vectorize_texts(texts: Sequence[str]) -> sp.csr_matrix:
    """Return (I, V) TF-IDF vectors of unit length; terms are words and pairs of neighbouring words.

    Texts without words get zeros.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # late: the import takes a second

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=_TERM_PATTERN,
        max_features=_MAX_TERMS,
        dtype=np.float32,
    )
    has_words = any(vectorizer.build_analyzer()(text) for text in texts)
    return vectorizer.fit_transform(texts).tocsr() if has_words else sp.csr_matrix((len(texts), 1), dtype=np.float32)


def compute_text_vectors(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """Return (I, K) text vectors of unit length; zeros for texts without words.

    Args:
        texts: (I,) item texts.
        width: K; the last columns are zero if items or terms are fewer.
    """
    from sklearn.decomposition import TruncatedSVD  # late: the import takes a second
    from sklearn.preprocessing import normalize

    terms = vectorize_texts(texts)
    vectors = np.zeros((len(texts), width), dtype=np.float32)
    rank = min(width, *terms.shape)
    if rank == min(terms.shape):  # an exact decomposition; the randomized one needs a smaller rank
        left, sizes, _ = np.linalg.svd(terms.toarray(), full_matrices=False)
        vectors[:, :rank] = normalize(left * sizes)
    else:
        vectors[:, :rank] = normalize(TruncatedSVD(rank, random_state=0).fit_transform(terms))
    return vectors


def keep_text(item_idx: Tensor) -> Tensor:
    """Return indices, in any shape, that stand for the items as if no training row contained them."""
    return -2 - item_idx


class ItemText(nn.Module):
    """Linear map from text vectors to item rows: a vector and a bias, added to the learned row of the item.

    Attributes:
        vectors: (I + 1, K) text vectors; the last row is zero.
        map: from K to E + 1 numbers, zero at first.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, dim: int, num_rows: int = 1) -> None:
        """Store the vectors.

        Args:
            vectors: (I, K).
            dim: E.
            num_rows: training rows of all workers, over which the penalty is spread.
        """
        super().__init__()
        self.register_buffer("vectors", torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])]))
        self.map = nn.Linear(vectors.shape[1], dim + 1, bias=False)
        nn.init.zeros_(self.map.weight)
        self._num_rows = num_rows

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., E + 1) contributions to item rows; zero for -1 and for indices beyond the table.

        Also accepts the indices of ``keep_text``.
        """
        numbers = torch.where(index < -1, keep_text(index), index)
        last = len(self.vectors) - 1
        inside = (numbers >= 0) & (numbers < last)
        mapped: Tensor = self.map(functional.embedding(torch.where(inside, numbers, last), self.vectors))
        return mapped

    def penalty(self, num_rows: int, weight_decay: float, bias_weight_decay: float) -> Tensor:
        """Return the share of some training rows in the penalty () of a Gaussian prior on the map."""
        squares = self.map.weight.square().sum(dim=1)
        weighted: Tensor = weight_decay * squares[:-1].sum() + bias_weight_decay * squares[-1]
        return weighted * (num_rows / self._num_rows / 2)
