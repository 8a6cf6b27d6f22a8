"""Samples from interactions: splits, histories, as-of counts, negatives."""
