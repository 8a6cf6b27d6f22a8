"""Anchors: a simple, frozen score known before each row, to which the language model adds.

``score = anchor + gain * LLM + bias``, with gain and bias learned from 0, so training starts at the anchor's ranking.
An anchor reads events of seconds before the row's, and with ``preprocessing.ties: order`` also the user's likes of the
same second that stand earlier in the file.
"""

from collm_dist.anchor.features import AnchorKind
from collm_dist.anchor.score_anchor import Anchor, fit_anchor, load_anchor, prepare_anchor

__all__ = ["Anchor", "AnchorKind", "fit_anchor", "load_anchor", "prepare_anchor"]
