"""What the kernel for sequences computes, one sequence and one head after the other."""

import torch


def compare_sequences(layout, query, key, value, *, scaling, dropout, window):
    """Each sequence's queries against its own keys, aligned at their ends; as ``llm.sequences.compare_sequences``."""
    assert dropout == 0
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    found = torch.zeros_like(query)
    ends = zip(layout.query_ends.tolist(), layout.key_ends.tolist(), strict=True)
    first_query, first_key = next(ends)
    assert (first_query, first_key) == (0, 0)
    for last_query, last_key in ends:
        count, seen = last_query - first_query, last_key - first_key
        assert count <= layout.longest_queries
        assert seen <= layout.longest_keys
        distance = (torch.arange(count) + seen - count)[:, None] - torch.arange(seen)
        hidden = (distance < 0) | (distance >= (seen if window is None else window))
        rows = []
        for head in range(query.shape[1]):
            keys, values = (one[first_key:last_key, head // groups] for one in (key, value))
            scores = query[first_query:last_query, head] @ keys.T * scale
            rows.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=1) @ values)
        found = found.index_add(0, torch.arange(first_query, last_query), torch.stack(rows, dim=1))
        first_query, first_key = last_query, last_key
    assert (first_query, first_key) == (len(query), len(key))
    return found
