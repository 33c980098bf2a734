"""The table of contents of metrics.

Each module turns an objective's sums into numbers: `summarize(sums)` those of an
evaluation, `summarize_training(loss, weight, correct)` those of a log line;
`report(sums, names)` is a text for the screen, "" where there is none.
"""

import types

from fjft.evaluate import classification, masked, perplexity

METRICS: dict[str, types.ModuleType] = {
    "classification": classification,
    "masked": masked,
    "perplexity": perplexity,
}
