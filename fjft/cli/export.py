"""`fjft export`: a run's weights as files that other programs load."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fjft.cli import flags, weights
from fjft.errors import UserError

# Largest difference of logits that rounding merged weights to a type may make.
TOLERANCES = {"float32": 1e-3, "float16": 0.125, "bfloat16": 1.0, "q8_0": 4.0}
FORMATS = ("huggingface", "gguf")

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
        "Face\nmodel or GGUF file, whose logits are first compared with the adapted "
        "model's.",
        "fjft export --config=configs/smollm2_lora_quickstart.py --merge "
        "--output=merged",
    )
    weights.add_flags(parser, with_source=True)
    parser.add_argument(
        "--output",
        metavar="PATH",
        required=True,
        help="a new or empty directory; with --format=gguf a new file, *.gguf",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="huggingface",
        help="huggingface (the default), or gguf: one file for llama.cpp and what is "
        "built on it",
    )
    parser.add_argument(
        "--merge", action="store_true", help="fold the adapter into the weights"
    )
    parser.add_argument(
        "--dtype",
        choices=list(TOLERANCES),
        help="type of a whole model's weights, instead of model.dtype or the source's; "
        "q8_0, 8 bits in blocks, is for --format=gguf",
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
    flags.join_processes()
    if chosen.dtype == "q8_0" and chosen.format != "gguf":
        parser.error("--dtype=q8_0 is for --format=gguf")
    output = Path(chosen.output)
    _check_output(output, chosen.format)
    found = weights.choose(parser, chosen)
    if chosen.format == "gguf" and not chosen.merge and _brings_adapter(found):
        raise UserError(
            "a GGUF file has no place for an adapter; add --merge to fold it into the "
            "weights, or leave --format=gguf away to write the adapter"
        )
    # A checkpoint fits only onto the very base it was trained on.
    if chosen.dtype and found.step is None:
        # What is rounded to 8 bits starts from the best there is.
        dtype = "float32" if chosen.dtype == "q8_0" else chosen.dtype
        found = dataclasses.replace(found, dtype=dtype)
    model = _restore(weights.load(found, weights.make_mesh(found)), chosen.merge)
    dtype = chosen.dtype or str(model.compute_dtype)
    if chosen.merge and _is_adapted(model):
        model = merge(model, dtype, chosen.tolerance)
    if chosen.format == "gguf":
        _write_gguf(model, output, dtype)
    else:
        _write(model, output, dtype)
    print(f"wrote {found.describe()} to {output}")


def _restore(model: Any, merges: bool) -> Any:
    """A quantized model in full precision, unless an adapter alone is written."""
    from fjft.checkpoint.quantizing import is_quantized, restore_weights

    if not is_quantized(model) or (_is_adapted(model) and not merges):
        return model
    source = model.provenance.files.source
    print(f"read the quantized weights in full precision again from {source}")
    return restore_weights(model)


def _check_output(output: Path, form: str) -> None:
    if form == "gguf":
        if output.suffix != ".gguf":
            raise UserError(
                f"--output={output} is no name of a GGUF file; end it with .gguf"
            )
        if output.exists():
            raise UserError(f"--output={output} is there already; name a new file")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output} is there already; name a new directory")


def _brings_adapter(found: weights.Weights) -> bool:
    if found.step is not None:
        return found.experiment.method.PEFT_TYPE is not None
    return found.adapter is not None


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


def _write_gguf(model: Any, output: Path, dtype: str) -> None:
    from fjft.checkpoint.gguf_writer import save_gguf

    for warning in save_gguf(model, output, dtype):
        print(f"warning: {warning}")


def merge(model: Any, dtype: str, tolerance: float | None) -> Any:
    """Merges a model's adapters and compares what it says before and after.

    Args:
      model: A model with adapters.
      dtype: Type that the merged weights are compared in.
      tolerance: Largest difference of logits; None is the type's own.

    Returns:
      The merged model, its weights of type `dtype`; not yet rounded to q8_0.

    Raises:
      UserError: The logits differ by more.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fjft import tree
    from fjft.checkpoint.adapter import merge_adapter
    from fjft.models.bare import without_adapters

    merged = merge_adapter(model)
    graphdef, params = tree.split(merged)
    if dtype == "q8_0":
        from fjft.checkpoint.gguf_encode import round_trip

        rounded = round_trip(params, merged.provenance.sites, dtype)
        written = tree.merge(graphdef, rounded)
    else:
        params = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)), params)
        merged = written = tree.merge(graphdef, params)
    batch = _encode(model.provenance.files.load_tokenizer())
    adapted_logits, merged_logits = _logits(model, batch), _logits(written, batch)
    effect = float(
        np.abs(adapted_logits - _logits(without_adapters(model), batch)).max()
    )
    difference = float(np.abs(adapted_logits - merged_logits).max())
    what = "texts" if len(adapted_logits) == len(TEXTS) else "tokens"
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    said = f"merged and adapted logits differ by at most {difference:.3g}"
    # Written so that NaN fails too.
    if not difference <= limit:
        raise UserError(
            f"{said} in {dtype}, more than the tolerance {limit:g}, so nothing was "
            "written; store in --dtype=float32, or allow it by --tolerance"
        )
    print(
        f"{said} on {len(adapted_logits)} {what}, the adapter moves them by up to "
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
    """Logits [N, V] computed in float32, so that only weights are compared.

    N are tokens, or whole texts where the head sees those.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fjft import tree
    from fjft.distributed import fetch
    from fjft.models.encoder_decoder import EncoderDecoder

    inputs, is_token = dict(batch), batch["segment_ids"] != 0
    if isinstance(model, EncoderDecoder):
        inputs |= {f"decoder_{name}": values for name, values in batch.items()}
    graphdef, params = tree.split(model)
    model = tree.merge(graphdef, params)
    model.compute_dtype = jnp.dtype("float32")
    graphdef, params = tree.split(model)

    @jax.jit
    def apply(params: tree.Params, inputs: dict[str, jax.Array]) -> jax.Array:
        return tree.merge(graphdef, params)(**inputs)

    with jax.default_matmul_precision("highest"):
        logits = fetch(apply(params, inputs)).astype(np.float32)
    return logits[is_token] if logits.shape[:2] == is_token.shape else logits
