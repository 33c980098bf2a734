"""LoRA models of `peft` in torch, and what compares them with ours."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

import fjft
from fjft import tree
from fjft.peft.targets import PeftTensor

ADAPTER_NAME = ".default"


def make_peft(twin: Any, seed: int = 0, **options: Any) -> Any:
    """`peft`'s LoRA on a copy of a torch model, as it starts."""
    import peft

    return make_from(twin, peft.LoraConfig(task_type="CAUSAL_LM", **options), seed)


def make_from(twin: Any, config: Any, seed: int = 0) -> Any:
    """`peft`'s model of a config on a copy of a torch model, as it starts."""
    import peft
    import torch

    torch.manual_seed(seed)
    return peft.get_peft_model(copy.deepcopy(twin), config).eval()


def randomize(model: Any, trained: Any = None, seed: int = 1) -> Any:
    """Moves everything that is trained to random values, away from where it starts."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (trained or trained_by_peft)(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def save_peft(model: Any, directory: Any) -> None:
    """What `peft` writes, less the embeddings that it would add to parts of them."""
    model.save_pretrained(directory, save_embedding_layers=False)


def load_peft(twin: Any, directory: Any) -> Any:
    """A PEFT directory on top of a copy of a torch model, loaded by `peft`."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(twin), directory).eval()


def trained_by_peft(model: Any) -> dict[str, Any]:
    """What `peft` trains, under the names of its files."""
    return {
        _name_in_file(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trained_by_torch(model: Any) -> dict[str, Any]:
    """What requires a gradient, under Hugging Face's names."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _name_in_file(name: str) -> str:
    """The name in PEFT's file of a parameter of its model."""
    name = name.replace(ADAPTER_NAME, "").replace(".modules_to_save", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def table(model: Any) -> list[Any]:
    """PEFT's tensors of our model."""
    provenance = model.provenance
    return provenance.method.peft_tensors(
        model, provenance.sites, provenance.peft_config
    )


def trained_table(model: Any) -> list[Any]:
    """What is trained, by the names of its files.

    Those are Hugging Face's where a method has none, and our paths for a network that
    is thrown away after training.
    """
    trainable = is_trainable(model)
    if model.provenance.method.PEFT_TYPE is None:
        return [
            PeftTensor(name, site.path, place)
            for site in model.provenance.sites
            if trainable(site.path)
            for name, place in site.tensors()
        ]
    # What is written under several names is named by its first, as torch has it.
    once = {(t.path, str(t.index)): t for t in reversed(table(model))}
    found = [tensor for tensor in once.values() if trainable(tensor.path)]
    in_files = {tensor.path for tensor in found}
    return found + [
        PeftTensor(path, path, (slice(None),))
        for path in tree.split(model)[1]
        if trainable(path) and path not in in_files
    ]


def copy_values(model: Any, theirs: dict[str, Any]) -> Any:
    """Our model with the numbers of an oracle's trained parameters; another object."""
    graphdef, params = tree.split(model)
    tensors = trained_table(model)
    new = {t.path: np.array(params[t.path]) for t in tensors}
    for tensor in tensors:
        new[tensor.path][tensor.index] = theirs[tensor.name].detach().numpy()
    put = {p: jax.device_put(v, params[p].sharding) for p, v in new.items()}
    copied = tree.merge(graphdef, params | put)
    copied.provenance = model.provenance
    return copied


def is_trainable(model: Any) -> Any:
    """What our method trains."""
    provenance = model.provenance
    return provenance.method.is_trainable(provenance.peft_config, provenance.sites)


def scatter(model: Any, seed: int = 3) -> Any:
    """Gives our trained parameters random values, spare rows and columns left out."""
    rng = np.random.default_rng(seed)
    _, params = tree.split(model)
    new = {}
    for tensor in table(model):
        if tensor.path not in new:
            new[tensor.path] = np.zeros(params[tensor.path].shape, np.float32)
        part = new[tensor.path][tensor.index]
        new[tensor.path][tensor.index] = 0.15 * rng.standard_normal(part.shape)
    tree.update(model, {path: jnp.asarray(value) for path, value in new.items()})
    return model


def assert_same_logits(ours: Any, theirs: Any, tolerance: float) -> float:
    """Compares logits on a few random tokens; returns the largest difference."""
    ids = tiny.random_ids(2, 20)
    error = tiny.max_error(tiny.jit_apply(ours)(ids), tiny.torch_logits(theirs, ids))
    assert error < tolerance
    return error


def mean_loss_gradients(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """Our mean loss and its gradients by path, of what is trained."""
    from fjft.objectives import causal_lm

    graphdef, params = tree.split(model)
    trained, frozen = tree.partition(params, is_trainable(model))

    @jax.jit
    @jax.value_and_grad
    def mean_loss(trained: Any) -> jax.Array:
        merged = tree.merge(graphdef, frozen, trained)
        arrays = jax.tree.map(jnp.asarray, batch)
        sums = causal_lm.loss(merged, arrays, causal_lm.Config())
        return sums.loss / sums.weight

    return mean_loss(trained)


def load(source: Any, adapter: Any) -> Any:
    """Our model with a PEFT directory on top."""
    return fjft.load_model(str(source), adapter=adapter)
