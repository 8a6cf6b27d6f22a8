"""From raw logs to clean interactions: readers, columns and types, filters, checks."""
