"""Numbers that look random and follow from a place and a seed alone."""

import numpy as np


def draw(places: np.ndarray, *seed: int) -> np.ndarray:
    """A float64 in [0, 1) for each place: splitmix64 of its number and the seed."""
    mixed = places.astype(np.uint64)
    offset = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + offset
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)) * 2.0**-53
