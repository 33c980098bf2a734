"""The tiny models that methods are tried on: what goes in, and what is to be learned.

A decoder learns by the objective of language modelling, on packed rows; what has
another shape by a plain cross-entropy against random labels, here and in torch.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import tiny_encoders
import tiny_seq2seq
import torch
import torch_training

from fjft.objectives import causal_lm
from fjft.objectives.cross_entropy import Sums

T = 16
ROWS = [[T], [7, 9], [5, 4, 6], [12]]
# Rows of one segment, for methods that `peft` cannot train on packed ones.
UNPACKED = [[T], [T], [13], [T]]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Base:
    """A tiny model in torch, and how it is fed and trained on either side.

    Attributes:
      directory: The Hugging Face directory that ours is loaded from.
      twin: The oracle, in torch, which all tests leave as it is.
      inputs: A batch's keys that the model is called with -> their names in torch.
      make_batch: Makes the batch of a seed, from the lengths of segments.
      loss: Ours, `(model, batch, rng) -> Sums`.
      sum_loss: Theirs, `(model, batch, num_items)`.
    """

    directory: Path
    twin: Any
    inputs: dict[str, str]
    make_batch: Callable[[int, list], Batch]
    loss: Callable[[Any, Any, Any], Sums]
    sum_loss: Callable[[Any, Batch, int], torch.Tensor]

    def logits(self, model: Any, batch: Batch) -> np.ndarray:
        """Our logits."""
        graphdef, params = tiny.split_bare(model)
        arrays = {name: jnp.asarray(batch[name]) for name in self.inputs}
        return np.asarray(_apply(graphdef, params, arrays))

    def their_logits(self, model: Any, batch: Batch) -> np.ndarray:
        """The oracle's logits."""
        with torch.no_grad():
            logits = model(**_torch_inputs(self.inputs, batch)).logits.numpy()
        # `peft` gives those of virtual tokens too, which come first.
        return logits[:, -T:] if logits.ndim == 3 else logits


_apply = jax.jit(
    lambda graphdef, params, inputs: tiny.tree.merge(graphdef, params)(**inputs),
    static_argnums=0,
)


def _torch_inputs(inputs: dict[str, str], batch: Batch) -> dict[str, torch.Tensor]:
    return {theirs: torch.tensor(batch[n]).long() for n, theirs in inputs.items()}


def _decoder(case: str, directory: Path) -> Base:
    twin = tiny.torch_model(case)
    return Base(
        tiny.save_torch(twin, directory),
        twin,
        {"input_ids": "input_ids"},
        lambda seed, rows: tiny.make_batch(rows, T, seed),
        lambda model, batch, rng: causal_lm.loss(
            model, batch, causal_lm.Config(), rng=rng
        ),
        torch_training.sum_loss,
    )


def _labelled(
    twin: Any, directory: Path, inputs: dict[str, str], labels: tuple[int, ...]
) -> Base:
    """A model whose every logit has a random label."""

    def make_batch(seed: int, rows: list) -> Batch:
        shape = len(rows), T
        batch = {
            name: tiny_seq2seq.random_ids(*shape, seed=2 * seed + number)
            for number, name in enumerate(inputs)
        }
        shape_of_labels = (len(rows), *labels[:-1])
        drawn = np.random.default_rng(seed).integers(0, labels[-1], shape_of_labels)
        return batch | {
            "labels": drawn.astype(np.int32),
            "segment_ids": np.ones(shape, np.int32),
        }

    def loss(model: Any, batch: Any, rng: Any) -> Sums:
        del rng
        logits = model(**{name: batch[name] for name in inputs})
        picked = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(picked, batch["labels"][..., None], -1)
        weight = jnp.float32(batch["labels"].size)
        return Sums(-picked.sum(), weight, jnp.float32(0))

    def sum_loss(model: Any, batch: Batch, num_items: int) -> torch.Tensor:
        del num_items
        model.eval()  # Ours has no dropout either.
        logits = model(**_torch_inputs(inputs, batch)).logits
        wanted = torch.tensor(batch["labels"]).long().flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), wanted)

    return Base(directory, twin, inputs, make_batch, loss, sum_loss)


def _encoder(case: str, directory: Path) -> Base:
    twin = tiny_encoders.torch_model(case)
    tiny_encoders.save(twin, directory)
    inputs = {"input_ids": "input_ids"}
    return _labelled(twin, directory, inputs, (twin.config.num_labels,))


def _seq2seq(case: str, directory: Path) -> Base:
    twin = tiny_seq2seq.torch_model(case)
    twin.save_pretrained(directory)
    tiny.make_tokenizer().save_pretrained(directory)
    inputs = {name: name for name in ("input_ids", "decoder_input_ids")}
    return _labelled(twin, directory, inputs, (T, twin.config.vocab_size))


KINDS = {
    "decoder": (tiny.CASES, _decoder),
    "encoder": (tiny_encoders.CASES, _encoder),
    "encoder-decoder": (tiny_seq2seq.CASES, _seq2seq),
}


def kind(case: str) -> str:
    """The kind of model that `family/variant`, or `family/variant/head`, is."""
    return next(name for name, (cases, _) in KINDS.items() if case in cases)


def make_base(case: str, directory: Path) -> Base:
    """Saves the torch model of a case."""
    return KINDS[kind(case)][1](case, directory)
