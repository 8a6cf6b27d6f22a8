"""From raw logs to micro-batches: readers, splits, samples, shards, prompts, loader."""
