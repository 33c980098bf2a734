"""How far from a model's output its parameters lie."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from fjft.models.weights import module_at

_IN_STACK = re.compile(r"(.+?)\.blocks\.(\d+)\.")
# What follows on the layers of a decoder, an encoder or either half of both.
_ABOVE = re.compile(r"((en|de)coder\.)?(norm|head|lm_head|bias)(\.|$)")


def find_heights(model: Any, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """How many layers' steps each parameter is away from the output.

    Of L layers the last is 1 away and the first L, and what lies before them L + 1;
    norms and heads behind them are 0 away. Each half of an encoder-decoder has its own
    layers, and what both share lies before the deeper one. T5's tables of relative
    positions are parts of first layers, as in torch.

    Args:
      model: The model; its parameters may be shapes.
      paths: Those of the parameters.

    Returns:
      By path: int [L] for a parameter that is stacked over layers, else int [].
    """
    paths = list(paths)
    found = {path: _IN_STACK.match(path) for path in paths}
    stacks = {match[1]: module_at(model, match[1]) for match in found.values() if match}
    depths = {name: sum(map(len, stack.layers)) for name, stack in stacks.items()}
    heights = {}
    for path, match in found.items():
        if match is not None:
            layers = stacks[match[1]].layers[int(match[2])]
            heights[path] = depths[match[1]] - np.array(layers)
        elif _ABOVE.match(path):
            heights[path] = np.array(0)
        else:
            half, _, rest = path.partition(".")
            own = [d for name, d in depths.items() if name == f"{half}.layers"]
            depth = max(own or depths.values(), default=0)
            is_of_first = rest.startswith("relative_bias.")
            heights[path] = np.array(depth if is_of_first else depth + 1)
    return heights
