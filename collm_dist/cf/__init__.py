"""Collaborative-filtering models, their training and export, and what the slots read from them."""
