"""The table of contents of ways to train, by `peft.method`."""

import types

from fjft.peft import (
    adalora,
    bitfit,
    bottleneck,
    full,
    ia3,
    last_layers,
    layer_norm,
    lora,
    p_tuning,
    prefix,
    prompt,
    select,
    trainable_tokens,
    vera,
)

METHODS: dict[str, types.ModuleType] = {
    "adalora": adalora,
    "full": full,
    "last_layers": last_layers,
    "lora": lora,
    "p_tuning": p_tuning,
    "prefix": prefix,
    "prompt": prompt,
    "ia3": ia3,
    "layer_norm": layer_norm,
    "bitfit": bitfit,
    "select": select,
    "trainable_tokens": trainable_tokens,
    "vera": vera,
    "bottleneck": bottleneck,
}
