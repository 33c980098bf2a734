"""Ways of training few parameters: one file per method, all through one seam.

A method is a module with

- `Config`, its frozen options, and `PEFT_TYPE`, its name in PEFT's files or None;
- `cuts(config, num_layers)`: where the stack of layers must be cut;
- `attach(model, sites, config, rngs)`: puts adapters into the model's slots;
- `is_trainable(config, sites)`: a predicate on paths.

A method with a `PEFT_TYPE` also has `peft_config`, `peft_tensors` and `from_peft`, its
file format in both directions.
"""
