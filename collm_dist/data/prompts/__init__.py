"""From samples to micro-batches: template, item tokens, layout."""
