"""collm-dist: from raw interaction logs to a tuned CoLLM recommender."""
