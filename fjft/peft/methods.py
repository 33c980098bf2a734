"""The table of contents of ways to train, by `peft.method`."""

import types

from fjft.peft import full, last_layers, lora

METHODS: dict[str, types.ModuleType] = {
    "full": full,
    "last_layers": last_layers,
    "lora": lora,
}
