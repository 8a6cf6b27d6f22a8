"""Evaluation: baselines, scores, bootstrap intervals and the report."""
