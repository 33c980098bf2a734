"""The table of contents of metrics.

Each module turns what an objective's `evaluate` gives into numbers: its
`Tally(examples, config)` (see `sums.Tally`) adds that up; `summarize(sums)` are the
numbers of an evaluation, `summarize_training(loss, weight, correct)` those of a log
line; `report(sums, names)` is a text for the screen, "" where there is none. Where
something is predicted of single examples, `Predictions` tells it (see
`predictions.Writer`).
"""

import types

from fjft.evaluate import (
    classification,
    desirability,
    distillation,
    entities,
    masked,
    perplexity,
    preferences,
    retrieval,
    rewards,
    spans,
)

METRICS: dict[str, types.ModuleType] = {
    "classification": classification,
    "desirability": desirability,
    "distillation": distillation,
    "entities": entities,
    "masked": masked,
    "perplexity": perplexity,
    "preferences": preferences,
    "retrieval": retrieval,
    "rewards": rewards,
    "spans": spans,
}
