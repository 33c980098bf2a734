"""The table of contents of ways to train, by `peft.method`."""

import types

from fjft.peft import adalora, full, last_layers, lora, p_tuning, prefix, prompt

METHODS: dict[str, types.ModuleType] = {
    "adalora": adalora,
    "full": full,
    "last_layers": last_layers,
    "lora": lora,
    "p_tuning": p_tuning,
    "prefix": prefix,
    "prompt": prompt,
}
