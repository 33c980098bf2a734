"""Spans that were taken out of texts, written by a model that reads the rest.

The data make pairs of texts, and from there on it is `seq2seq`.
"""

from fjft.objectives.seq2seq import HEAD, METRICS, Config, evaluate, loss

__all__ = ["EXAMPLES", "HEAD", "METRICS", "Config", "evaluate", "loss"]

EXAMPLES = "corrupted"
