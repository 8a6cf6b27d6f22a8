"""Everything that runs on Ray, and the pipeline. No other package imports ray."""
