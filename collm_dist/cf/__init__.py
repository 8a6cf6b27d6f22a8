"""Collaborative-filtering models: training, export, and the vectors that slots read."""
