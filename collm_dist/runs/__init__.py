"""The run directory: paths and records, atomic writes, fingerprints, lock, status, reuse, publishing."""
