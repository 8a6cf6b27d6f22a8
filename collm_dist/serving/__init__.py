"""Ranking with a finished run, from requests to scores, with the features of training and evaluation."""
