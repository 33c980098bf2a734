"""The table of contents of training objectives."""

import types

from fjft.objectives import causal_lm

OBJECTIVES: dict[str, types.ModuleType] = {"causal_lm": causal_lm}
