"""Data path from raw logs to micro-batches: ingest, samples, shards, prompts."""
