"""Index of item vectors: the items with the largest inner products with a user's vector.

Up to ``EXACT_BELOW`` items, or without FAISS, a product with all vectors is exact. Beyond, FAISS divides the items into
cells (inverted lists; Douze et al., "The Faiss library", arXiv 2401.08281) and compares only the cells nearest to the
user, as many as find ``MIN_RECALL`` of the exact result. The index is built from the model at each start and is not
stored: FAISS does not check the files that it reads.

Shapes: I items, D width of a vector, Q queries, N items found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm_dist.data.shards.context_block import IntArray

Vectors = NDArray[np.float32]

# Products with all vectors are faster than the index with one million items and slower with ten
# (benchmarks/results/retrieval_cpu.json). Between them an index gains too little for its memory and its minutes.
EXACT_BELOW = 5_000_000
MIN_RECALL = 0.95
# Items per query over which the recall is measured.
_MEASURED_ITEMS = 200
# Vectors that the centres of the cells are fitted to, per cell. FAISS's own default of 256 takes much longer.
_FITTED_PER_CELL = 64


class ItemIndex:
    """Item vectors, and FAISS's index of them if there are many.

    Attributes:
        recall: share of the exact result that is found, over the queries of the constructor; 1 if exact.
    """

    def __init__(self, vectors: Vectors, queries: Vectors, *, exact_below: int = EXACT_BELOW) -> None:
        """Build the index.

        Args:
            vectors: (I, D).
            queries: (Q, D) typical queries, by which the number of compared cells is chosen.
            exact_below: fewer items are searched exactly.
        """
        self._exact_below = exact_below
        self._vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._faiss = _import_faiss() if len(vectors) >= exact_below and len(queries) else None
        self.recall = 1.0
        if self._faiss is not None:
            self._cells = self._build_cells(self._faiss)
            self._choose_compared_cells(queries)

    def search(self, query: Vectors, count: int, allowed: NDArray[np.bool_] | None = None) -> IntArray:
        """Return the (N,) items with the largest inner products, best first; N <= count.

        Args:
            query: (D,).
            count: most items to return.
            allowed: (I,) items that may be returned; None = all.
        """
        # Few allowed items may all lie in cells that are not compared.
        if self._faiss is None or (allowed is not None and np.count_nonzero(allowed) < self._exact_below):
            return self._search_exactly(query, count, allowed)
        parameters = self._faiss.SearchParametersIVF(nprobe=self._cells.nprobe)
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # the selector keeps a pointer to them
            parameters.sel = self._faiss.IDSelectorBitmap(bits)
        _, found = self._cells.search(query[None], min(count, len(self._vectors)), params=parameters)
        items: IntArray = found[0][found[0] >= 0]
        if len(items) < count and allowed is not None:  # the compared cells have too few allowed items
            return self._search_exactly(query, count, allowed)
        return items

    def _search_exactly(self, query: Vectors, count: int, allowed: NDArray[np.bool_] | None) -> IntArray:
        items = np.arange(len(self._vectors)) if allowed is None else np.flatnonzero(allowed)
        if allowed is None:
            scores = self._vectors @ query
        elif 4 * len(items) < len(self._vectors):
            scores = self._vectors[items] @ query
        else:  # a copy of most vectors would take longer than products with all of them
            scores = (self._vectors @ query)[items]
        if count < len(items):
            kept = np.argpartition(-scores, count)[:count]
            items, scores = items[kept], scores[kept]
        return items[np.lexsort((items, -scores))]

    def _build_cells(self, faiss: Any) -> Any:
        width, num_cells = self._vectors.shape[1], int(4 * len(self._vectors) ** 0.5)
        cells = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, num_cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        fitted = np.random.default_rng(0).choice(
            len(self._vectors), min(len(self._vectors), _FITTED_PER_CELL * num_cells), replace=False
        )
        cells.train(self._vectors[np.sort(fitted)])
        cells.add(self._vectors)
        return cells

    def _choose_compared_cells(self, queries: Vectors) -> None:
        """Double the number of compared cells until the recall suffices or all cells are compared."""
        count = min(_MEASURED_ITEMS, len(self._vectors))
        exact = [set(self._search_exactly(query, count, None).tolist()) for query in queries]
        self._cells.nprobe = 1
        while True:
            found = [
                len(best & set(self.search(query, count).tolist())) for query, best in zip(queries, exact, strict=True)
            ]
            self.recall = sum(found) / (count * len(queries))
            if self.recall >= MIN_RECALL or self._cells.nprobe >= self._cells.nlist:
                return
            self._cells.nprobe *= 2


def _import_faiss() -> Any:
    """Return the module faiss, or None if it is not installed: the search is exact then, and slower."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
