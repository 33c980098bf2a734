"""A tiny Llama with an adapter that has learned something, here and in trl's hands."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.numpy
import tiny
import torch
from datasets import Dataset

import fjft
from fjft import tree
from fjft.models.bare import without_adapters
from fjft.peft import lora

CASE = "llama/llama3-rope-biases"
TARGETS = ["q_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Our model, and the directory of its PEFT adapter.

    Attributes:
      graphdef: The model's structure.
      learned: The adapter's parameters.
      frozen: The others.
      root: Where `adapter` is.
    """

    graphdef: Any
    learned: tree.Params
    frozen: tree.Params
    root: Path

    def gradients(
        self, objective: Any, config: Any, batch: dict[str, np.ndarray]
    ) -> tuple[jax.Array, Any, tree.Params]:
        """An objective's mean loss, its sums, and the adapter's gradients."""

        @jax.jit
        def gradient(learned: tree.Params, batch: Any) -> Any:
            def mean_loss(learned: tree.Params) -> Any:
                model = tree.merge(self.graphdef, self.frozen, learned)
                reference = without_adapters(model)
                sums = objective.loss(model, batch, config, reference=reference)
                return sums.loss / sums.weight, sums

            return jax.value_and_grad(mean_loss, has_aux=True)(learned)

        (loss, sums), grads = gradient(self.learned, jax.tree.map(jnp.asarray, batch))
        return loss, sums, grads

    def make_trainer(self, cls: Any, args: Any, rows: Sequence[Any]) -> Any:
        """One of trl's trainers with the same model and the same adapter."""
        trainer = cls(
            model=tiny.make_torch(tiny.make_config(CASE)),
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tiny.make_tokenizer(),
            peft_config=peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"
            ),
        )
        file = self.root / "adapter/adapter_model.safetensors"
        weights = safetensors.numpy.load_file(file)
        tensors = {name: torch.tensor(value) for name, value in weights.items()}
        peft.set_peft_model_state_dict(trainer.model, tensors)
        return trainer

    def assert_gradients_equal(
        self, grads: tree.Params, theirs: Any, directory: Path
    ) -> None:
        """Gradients lie where the factors do, so PEFT's names are theirs too."""
        shown = tree.merge(self.graphdef, self.frozen, self.learned)
        tree.update(shown, grads)
        fjft.save_adapter(shown, directory)
        named = dict(theirs.named_parameters())
        ours = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
        assert len(ours) == 2 * len(TARGETS) * 3
        for name, value in ours.items():
            wanted = named[name.replace(".weight", ".default.weight")].grad
            assert wanted is not None
            scale = max(float(wanted.abs().max()), 1e-3)
            np.testing.assert_allclose(value, wanted.numpy(), atol=1e-4 * scale)


def make_adapted(root: Path) -> Adapted:
    """Writes the base and the adapter."""
    twin = tiny.make_torch(tiny.make_config(CASE))
    base = tiny.save_torch(twin, root / "base")
    config = lora.Config(r=4, lora_alpha=8.0, target_modules="|".join(TARGETS))
    model = tiny.build_model(base, method=lora, peft_config=config)
    random = np.random.default_rng(0)
    graphdef, params = tree.split(model)
    learned, frozen = tree.partition(params, lora.is_trainable(config, ()))
    learned = {
        path: jnp.asarray(0.2 * random.standard_normal(x.shape), jnp.float32)
        for path, x in learned.items()
    }
    fjft.save_adapter(tree.merge(graphdef, frozen, learned), root / "adapter")
    return Adapted(graphdef, learned, frozen, root)
