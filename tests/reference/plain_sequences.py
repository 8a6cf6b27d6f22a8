"""Attention of variable-length sequences, computed one sequence and one head at a time."""

import torch


def attend_sequences(layout, query, key, value, *, scaling, dropout, window):
    """Attend from each sequence's queries to its own keys, aligned at their ends; as ``sequences.flash_attention``."""
    assert dropout == 0
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    output = torch.zeros_like(query)
    ends = zip(layout.query_ends.tolist(), layout.key_ends.tolist(), strict=True)
    first_query, first_key = next(ends)
    assert (first_query, first_key) == (0, 0)
    for last_query, last_key in ends:
        count, num_keys = last_query - first_query, last_key - first_key
        assert count <= layout.max_queries
        assert num_keys <= layout.max_keys
        distance = (torch.arange(count) + num_keys - count)[:, None] - torch.arange(num_keys)
        hidden = (distance < 0) | (distance >= (num_keys if window is None else window))
        rows = []
        for head in range(query.shape[1]):
            keys, values = (heads[first_key:last_key, head // groups] for heads in (key, value))
            scores = query[first_query:last_query, head] @ keys.T * scale
            rows.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=1) @ values)
        output = output.index_add(0, torch.arange(first_query, last_query), torch.stack(rows, dim=1))
        first_query, first_key = last_query, last_key
    assert (first_query, first_key) == (len(query), len(key))
    return output
