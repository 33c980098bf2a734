"""Steps whose loss is far outside the recent ones."""

import statistics
from collections.abc import Sequence

# Losses that are remembered, and the fewest that say what is usual.
MOST, FEWEST = 50, 20
# How many standard deviations are far outside: a normal loss is one time in 1e9.
_DEVIATIONS = 6.0
# A loss that hardly varies any more has to rise by this share of itself too.
_SHARE = 0.5


def find_usual(recent: Sequence[float], loss: float) -> float | None:
    """What losses usually are, if this one is far above it; None if it is not.

    Both the usual loss and its deviation are medians, which spikes do not move.

    Args:
      recent: Losses of the steps before.
      loss: That of this step.
    """
    if len(recent) < FEWEST:
        return None
    usual = statistics.median(recent)
    spread = statistics.median(abs(one - usual) for one in recent)
    # The median deviation of a normal distribution is 0.6745 of the standard one.
    limit = max(_DEVIATIONS * spread / 0.6745, _SHARE * abs(usual))
    return usual if loss - usual > limit else None
