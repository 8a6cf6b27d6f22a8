"""Micro-batches from samples: templates, item tokens, layout."""
