"""Optimizers and schedules, as numbers of `transformers` and `torch` have them."""
