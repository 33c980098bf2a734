"""Fine-tunes Hugging Face language models in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fjft.adapters import combine_adapters, load_adapters, set_adapters
    from fjft.build import load_config
    from fjft.checkpoint.adapter import merge_adapter, save_adapter
    from fjft.checkpoint.huggingface import save_model
    from fjft.errors import UserError
    from fjft.generation.text import generate
    from fjft.planning.planner import plan
    from fjft.pretrained import load_model
    from fjft.training.loop import train

__all__ = [
    "UserError",
    "combine_adapters",
    "generate",
    "load_adapters",
    "load_config",
    "load_model",
    "merge_adapter",
    "plan",
    "save_adapter",
    "save_model",
    "set_adapters",
    "train",
]

_HOMES = {
    "UserError": "fjft.errors",
    "combine_adapters": "fjft.adapters",
    "generate": "fjft.generation.text",
    "load_adapters": "fjft.adapters",
    "load_config": "fjft.build",
    "load_model": "fjft.pretrained",
    "merge_adapter": "fjft.checkpoint.adapter",
    "plan": "fjft.planning.planner",
    "save_adapter": "fjft.checkpoint.adapter",
    "save_model": "fjft.checkpoint.huggingface",
    "set_adapters": "fjft.adapters",
    "train": "fjft.training.loop",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import fjft` stays light.
    if name not in _HOMES:
        raise AttributeError(f"module 'fjft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
