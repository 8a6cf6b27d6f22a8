"""Samples on disk and their global order: manifest, shard reader and writer, local copies."""
