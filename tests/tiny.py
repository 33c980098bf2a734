"""Tiny random models of every family, with numbers nobody would guess, and their twins.

The twin is the `transformers` model in torch with eager attention: the outside oracle.
A new family needs an entry in `CONFIGS` and gets the whole battery.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tiny_decoders

import fjft
from fjft import pretrained, sharding, tree
from fjft.checkpoint.source import ModelFiles, open_model

VOCAB_SIZE = 64

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 3e3, "factor": 2.5}


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# model_type -> variant -> fields of the Hugging Face config.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "llama3-rope-biases": SHAPE
        | {
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3_ROPE,
        },
        "linear-rope-tied": SHAPE
        | {
            "num_key_value_heads": 6,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": LINEAR_ROPE,
        },
    },
    "mistral": {
        "short-window": SHAPE
        | {
            "head_dim": 10,
            "sliding_window": 5,
            "rope_parameters": _plain_rope(700.0),
        },
        "long-window-tied": SHAPE
        | {
            "head_dim": 12,
            "sliding_window": 40,
            "tie_word_embeddings": True,
            "rope_parameters": _plain_rope(2e4),
        },
    },
    "qwen2": {
        "sliding-last-layers": SHAPE
        | {
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "rope_parameters": _plain_rope(2.5e3),
        },
        "no-window-tied": SHAPE
        | {
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR_ROPE,
        },
    },
    "qwen3": {
        "alternating-biases": SHAPE
        | {
            "num_hidden_layers": 5,
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2
            + ["sliding_attention"],
            "rope_parameters": _plain_rope(900.0),
        },
        "no-window-tied": SHAPE
        | {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": _plain_rope(4e4),
        },
    },
}
CONFIGS |= tiny_decoders.CONFIGS
CASES = [f"{family}/{name}" for family, names in CONFIGS.items() for name in names]


def make_config(case: str, **changes: Any) -> Any:
    """The Hugging Face config of `family/variant`."""
    import transformers

    family, _, variant = case.partition("/")
    # A config adds to the rope parameters it is given.
    values = copy.deepcopy(CONFIGS[family][variant] | changes)
    return transformers.AutoConfig.for_model(family, **values)


def make_torch(config: Any, seed: int = 0, auto: Any = None) -> Any:
    """A random torch model in which no norm is 1 and no bias is 0.

    Args:
      config: Its Hugging Face config.
      seed: Of its numbers.
      auto: The class that says which head it has; `AutoModelForCausalLM` when None.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    auto = transformers.AutoModelForCausalLM if auto is None else auto
    model = auto.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            mean = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean, 0.3)
    return model


@functools.cache
def torch_model(case: str) -> Any:
    """The twin; shared by all tests, which leave it as it is."""
    return make_torch(make_config(case))


def cast(model: Any, dtype: str) -> Any:
    """A copy with weights of another type; RoPE's float32 buffers stay as they are."""
    import torch

    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


class MemorySource:
    """A `TensorSource` over arrays, which counts the bytes that are read from it."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self.reads: list[tuple[str, tuple[int, ...]]] = []

    @property
    def names(self) -> Any:
        """Every tensor's name."""
        return self.arrays.keys()

    @property
    def bytes_read(self) -> int:
        """Bytes handed out so far."""
        return sum(
            int(np.prod(shape)) * self.dtype(name).itemsize
            for name, shape in self.reads
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns."""
        return self.arrays[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a part."""
        part = self.arrays[name][index].copy()
        self.reads.append((name, part.shape))
        return part


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """A torch model's weights as Hugging Face saves them: tied ones once."""
    tied = model.config.tie_word_embeddings
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    return as_stored(model, state)


def as_stored(model: Any, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by their names in torch, as they lie in files: each expert its own."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, dict(tensors))
    return {name: to_numpy(value) for name, value in stored.items()}


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy, bfloat16 included."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def memory_files(model: Any) -> ModelFiles:
    """A torch model as if it lay in a directory."""
    return ModelFiles(
        source="memory",
        origin=Path("memory"),
        tensors=MemorySource(state_arrays(model)),
        config=model.config,
        config_dict=model.config.to_dict(),
        generation_config=None,
        load_tokenizer=lambda: None,
    )


def build_model(
    files: ModelFiles | str | Path,
    method: Any = None,
    peft_config: Any = None,
    mesh: Any = None,
    dtype: str = "float32",
    **options: Any,
) -> Any:
    """`pretrained.build_model` on one device unless a mesh is given."""
    return pretrained.build_model(
        files if isinstance(files, ModelFiles) else open_model(str(files)),
        method=method,
        peft_config=peft_config,
        mesh=sharding.single_device_mesh() if mesh is None else mesh,
        dtype=dtype,
        **options,
    )


def make_tokenizer() -> Any:
    """A tokenizer of as many words as the models have, with a chat template."""
    import tokenizers
    import transformers

    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += [f"w{i}" for i in range(VOCAB_SIZE - len(words))]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}",
    )


def save_torch(model: Any, directory: Path, **options: Any) -> Path:
    """Writes the directory that a hub repository would be."""
    model.save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    generation = {"eos_token_id": [2, 5], "temperature": 0.7, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@dataclasses.dataclass(frozen=True)
class Twins:
    """One tiny model, here and in torch, with the same weights.

    Attributes:
      case: `family/variant`.
      directory: The Hugging Face directory that ours was loaded from.
      torch: The oracle.
      model: Ours, float32 on one device.
    """

    case: str
    directory: Path
    torch: Any
    model: Any

    @functools.cached_property
    def apply(self) -> Any:
        """Our forward pass, compiled: `(input_ids, positions, segment_ids)`."""
        return jit_apply(self.model)


def make_twins(case: str, directory: Path) -> Twins:
    """Saves the torch model of a case and loads it here."""
    torch_twin = torch_model(case)
    save_torch(torch_twin, directory)
    return Twins(case, directory, torch_twin, fjft.load_model(str(directory)))


def jit_apply(model: Any) -> Any:
    """A model's forward pass, compiled, from and to numpy."""
    graphdef, params = split_bare(model)

    def call(*args: Any) -> np.ndarray:
        arrays = [None if a is None else jnp.asarray(a, jnp.int32) for a in args]
        return np.asarray(_apply(graphdef, params, *arrays))

    return call


def split_bare(model: Any) -> tuple[Any, tree.Params]:
    """A model's structure, equal for equal models wherever they came from."""
    bare = tree.merge(*tree.split(model))
    bare.provenance = None
    return tree.split(bare)


# Compiled once for each structure and shape, whatever the weights.
_apply = jax.jit(
    lambda graphdef, params, *args: tree.merge(graphdef, params)(*args),
    static_argnums=0,
)


def torch_logits(model: Any, input_ids: np.ndarray, **options: Any) -> np.ndarray:
    """The oracle's logits."""
    import torch

    options = {k: torch.tensor(v).long() for k, v in options.items()}
    with torch.no_grad():
        out = model(torch.tensor(input_ids).long(), use_cache=False, **options)
    return out.logits.float().numpy()


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, shape).astype(np.int32)


def make_batch(
    rows: list[list[int]], length: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """A packed batch: `[[5, 9], [12]]` is a row of two segments and a row of one.

    Each segment's first quarter is a prompt, whose labels are ignored.
    """
    batch = {
        name: np.zeros((len(rows), length), np.int32)
        for name in ("input_ids", "positions", "segment_ids", "labels")
    }
    batch["labels"] -= 100
    ids = random_ids(len(rows), length, seed=seed)
    for b, lengths in enumerate(rows):
        start = 0
        for number, size in enumerate(lengths, 1):
            here = slice(start, start + size)
            batch["input_ids"][b, here] = ids[b, here]
            batch["positions"][b, here] = np.arange(size)
            batch["segment_ids"][b, here] = number
            trained = slice(start + size // 4, start + size)
            batch["labels"][b, trained] = ids[b, trained]
            start += size
    return batch


def unpack(batch: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """A packed batch's segments, each a batch of its own without padding."""
    found = []
    for b, segments in enumerate(batch["segment_ids"]):
        for number in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == number)
            found.append({name: x[b : b + 1, where] for name, x in batch.items()})
            found[-1]["segment_ids"] = np.ones_like(found[-1]["segment_ids"])
    return found


def gather(site: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hugging Face's tensors as our parameter has them."""
    parts = [
        arrays[name].T if site.transpose else arrays[name] for name in site.hf_names
    ]
    return np.stack(parts).reshape(*site.lead, *parts[0].shape)


def max_error(ours: Any, theirs: Any) -> float:
    """The largest absolute difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    return max_error(ours, theirs) / max(float(np.abs(theirs).max()), 1e-30)
