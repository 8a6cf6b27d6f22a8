"""Ranking with a finished run: requests to scores, by the feature function that training and evaluation use."""
