"""`fjft export`: a run's weights as files that other programs load."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fjft.cli import flags, weights
from fjft.errors import UserError

# Largest difference of logits that rounding merged weights to a type may make.
TOLERANCES = {"float32": 1e-3, "float16": 0.125, "bfloat16": 1.0}

TEXTS = (
    "The harbour was quiet at dawn. Two fishermen mended their nets and spoke of the "
    "storm that had kept them ashore for three days.",
    "To boil an egg, bring water to a simmer, lower the egg in with a spoon and wait "
    "seven minutes; then cool it under cold water.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags.make_parser(
        "export",
        "Writes a run's weights: the PEFT adapter, or with --merge a whole Hugging "
        "Face\nmodel, whose logits are first compared with the adapted model's.",
        "fjft export --config=configs/smollm2_lora_quickstart.py --merge "
        "--output=merged",
    )
    weights.add_flags(parser, with_source=True)
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="a new or empty directory"
    )
    parser.add_argument(
        "--merge", action="store_true", help="fold the adapter into the weights"
    )
    parser.add_argument(
        "--dtype",
        choices=list(TOLERANCES),
        help="type of a whole model's weights, instead of model.dtype or the source's",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of logits that --merge may make, by default "
        + ", ".join(f"{value:g} in {name}" for name, value in TOLERANCES.items()),
    )
    return parser


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Loads, merges if asked, and writes."""
    chosen = flags.parse(parser, argv)
    output = Path(chosen.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} is there already; name a new directory")
    found = weights.choose(parser, chosen)
    # A checkpoint fits only onto the very base it was trained on.
    if chosen.dtype and found.step is None:
        found = dataclasses.replace(found, dtype=chosen.dtype)
    model = weights.load(found, weights.make_mesh(found))
    dtype = chosen.dtype or str(model.compute_dtype)
    if chosen.merge and _is_adapted(model):
        model = merge(model, dtype, chosen.tolerance)
    _write(model, output, dtype)
    print(f"wrote {found.describe()} to {output}")


def _is_adapted(model: Any) -> bool:
    method = model.provenance.method
    return method is not None and method.PEFT_TYPE is not None


def _write(model: Any, output: Path, dtype: str) -> None:
    import jax.numpy as jnp

    from fjft.checkpoint.adapter import save_adapter
    from fjft.checkpoint.huggingface import save_model

    if _is_adapted(model):
        save_adapter(model, output)
    else:
        save_model(model, output, jnp.dtype(dtype))


def merge(model: Any, dtype: str, tolerance: float | None) -> Any:
    """Merges a model's adapters and compares what it says before and after.

    Args:
      model: A model with adapters.
      dtype: Type that the merged weights are rounded to.
      tolerance: Largest difference of logits; None is the type's own.

    Returns:
      The merged model, its weights of type `dtype`.

    Raises:
      UserError: The logits differ by more.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fjft import tree
    from fjft.checkpoint.adapter import merge_adapter

    merged = merge_adapter(model)
    graphdef, params = tree.split(merged)
    merged = tree.merge(
        graphdef, jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)), params)
    )
    batch = _encode(model.provenance.files.load_tokenizer())
    adapted_logits, merged_logits = _logits(model, batch), _logits(merged, batch)
    effect = float(np.abs(adapted_logits - _logits(_bare(model), batch)).max())
    difference = float(np.abs(adapted_logits - merged_logits).max())
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    said = f"merged and adapted logits differ by at most {difference:.3g}"
    # Written so that NaN fails too.
    if not difference <= limit:
        raise UserError(
            f"{said} in {dtype}, more than the tolerance {limit:g}, so nothing was "
            "written; store in --dtype=float32, or allow it by --tolerance"
        )
    print(
        f"{said} on {len(adapted_logits)} tokens, the adapter moves them by up to "
        f"{effect:.3g} (tolerance {limit:g} in {dtype})"
    )
    if difference > effect:
        print(
            f"warning: rounding to {dtype} changes more than the adapter does; store "
            "in --dtype=float32"
        )
    return merged


def _encode(tokenizer: Any) -> dict[str, Any]:
    """Real text, one row each, padded at the end."""
    import numpy as np

    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
    return {"input_ids": ids, "segment_ids": segments}


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    """Logits [tokens, V] computed in float32, so that only weights are compared."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fjft import tree

    graphdef, params = tree.split(model)
    model = tree.merge(graphdef, params)
    model.compute_dtype = jnp.dtype("float32")
    graphdef, params = tree.split(model)

    @jax.jit
    def apply(params: tree.Params, ids: jax.Array, segments: jax.Array) -> jax.Array:
        return tree.merge(graphdef, params)(ids, segment_ids=segments)

    with jax.default_matmul_precision("highest"):
        logits = apply(params, batch["input_ids"], batch["segment_ids"])
    return np.asarray(logits, np.float32)[batch["segment_ids"] != 0]


def _bare(model: Any) -> Any:
    from flax import nnx

    from fjft import tree

    bare = tree.merge(*tree.split(model))
    module: Any
    for _, module in list(nnx.iter_modules(bare)):
        if getattr(module, "adapter", None) is not None:
            module.adapter = nnx.data(None)
    return bare
