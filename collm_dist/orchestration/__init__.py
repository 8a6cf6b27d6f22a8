"""Everything that runs on Ray, and the pipeline. No other room imports ray."""
