"""The table of contents of model families, by Hugging Face's `model_type`."""

import types

from fjft.models import llama, qwen

FAMILIES: dict[str, types.ModuleType] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen,
    "qwen3": qwen,
}
