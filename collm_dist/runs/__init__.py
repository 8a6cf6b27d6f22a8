"""What a run directory is: paths and records, atomic writes, fingerprints, lock, status, reuse, publishing."""
