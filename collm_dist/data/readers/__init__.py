"""Readers: any supported raw layout becomes one stream of uniform rows."""

from collm_dist.data.readers.source import Chunk, ReadBatch, Source, open_source

__all__ = ["Chunk", "ReadBatch", "Source", "open_source"]
