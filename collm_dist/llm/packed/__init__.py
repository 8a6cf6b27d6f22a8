"""The shared-context engine: decoders over packed tokens."""
