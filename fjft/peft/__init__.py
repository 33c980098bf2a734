"""Ways of training few parameters: one file per method, all through one seam.

A method is a module with

- `Config`, its frozen options, and `PEFT_TYPE`, its name in PEFT's files or None;
- `cuts(config, num_layers)`: where the stack of layers must be cut;
- `attach(model, sites, config, rngs)`: puts adapters into the model's slots;
- `is_trainable(config, sites)`: a predicate on paths.

A method whose parameters start from the base's weights also has

- `start(model, sites, config, read)`: called once the weights are there, and before an
  adapter is read from a file; sets its own parameters in place. `read(site)` reads a
  quantized weight in full precision.

One whose parameters do not all learn at one rate has

- `rate(config, path, num_axes, learning_rate)`: what a parameter's is multiplied by.

One that does more than follow the objective's gradient also has

- `step_rule(model, sites, config, total_steps)`: the `StepRule` that says what.

A method with a `PEFT_TYPE` also has `peft_config`, `peft_tensors` and `from_peft`, its
file format in both directions (and `WEIGHTS_NAMES`, if its file has another name than
PEFT's), and may have `plain(model, sites, config)`, a model and options with which
these describe what the given ones cannot.
"""
