"""Clean interactions from raw logs: readers, columns and types, filters, checks."""
