"""Bottleneck adapters in torch, written from the papers' equations.

The library of AdapterHub does not import beside today's huggingface_hub; the names, the
places in a layer and the files are its own.
"""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

NAME = "sst-2"
# Reads, places, non-linearity, reduction factor, scaling: AdapterHub's presets.
PRESETS = {
    "houlsby": ("output", ("mh", "output"), "swish", 16, 1.0),
    "pfeiffer": ("sum", ("output",), "relu", 16, 1.0),
    "parallel": ("residual", ("output",), "relu", 2, 4.0),
}
ACTIVATIONS = {
    "swish": nn.functional.silu,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
}


class Bottleneck(nn.Module):
    """`h + s * W_up f(W_down z + b_down) + s * b_up`."""

    def __init__(self, size: int, kind: str, options: dict[str, Any]):
        super().__init__()
        self.reads, _, non_linearity, factor, scaling = PRESETS[kind]
        factor = options.get("reduction_factor", factor)
        self.scaling = options.get("scaling", scaling)
        self.f = ACTIVATIONS[options.get("non_linearity", non_linearity)]
        width = int(size // factor)
        self.adapter_down = nn.Sequential(nn.Linear(size, width))
        self.adapter_up = nn.Linear(width, size)
        linear: Any
        for linear in (self.adapter_down[0], self.adapter_up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if kind == "parallel":
            first: Any = self.adapter_down[0]
            nn.init.kaiming_uniform_(first.weight, a=5**0.5)
            nn.init.zeros_(self.adapter_up.weight)

    def forward(self, h: Any, x: Any, norm: Any) -> Any:
        """The sublayer's output h, which will join x, with the adapter's."""
        z = {"output": h, "sum": h + x, "residual": x}[self.reads]
        if self.reads == "sum" and norm is not None:
            z = norm(z)
        return h + self.scaling * self.adapter_up(self.f(self.adapter_down(z)))


def _inside(holder: nn.Module, name: str, bottleneck: nn.Module) -> None:
    """Puts an adapter where AdapterHub's names have it."""
    setattr(holder, name, nn.ModuleDict({NAME: bottleneck}))


def _adapt_llama(layer: Any, place: str, bottleneck: nn.Module) -> None:
    """Before a norm stands the residual stream that its sublayer joins."""
    seen: dict[str, Any] = {}
    norm, sublayer = {
        "mh": (layer.input_layernorm, layer.self_attn),
        "output": (layer.post_attention_layernorm, layer.mlp),
    }[place]
    name = {"mh": "attention_adapters", "output": "output_adapters"}[place]
    setattr(layer, name, nn.Module())
    _inside(getattr(layer, name), "adapters", bottleneck)
    norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))

    def hook(module: Any, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, tuple):
            return bottleneck(output[0], seen["x"], None), *output[1:]
        return bottleneck(output, seen["x"], None)

    sublayer.register_forward_hook(hook)


def _adapt_bert(layer: Any, place: str, bottleneck: nn.Module) -> None:
    """`LayerNorm(dense(hidden) + x)` with the adapter behind `dense`."""
    output = layer.attention.output if place == "mh" else layer.output
    _inside(output, "adapters", bottleneck)

    def forward(hidden_states: Any, input_tensor: Any) -> Any:
        h = bottleneck(output.dense(hidden_states), input_tensor, output.LayerNorm)
        return output.LayerNorm(h + input_tensor)

    output.forward = forward


def make(twin: Any, kind: str, **options: Any) -> Any:
    """A torch model with adapters, of which these, and a classifier, are trained."""
    twin.requires_grad_(False)
    is_bert = hasattr(twin, "bert")
    layers = twin.bert.encoder.layer if is_bert else twin.model.layers
    for layer in layers:
        for place in PRESETS[kind][1]:
            bottleneck = Bottleneck(twin.config.hidden_size, kind, options)
            (_adapt_bert if is_bert else _adapt_llama)(layer, place, bottleneck)
    if is_bert:
        twin.classifier.requires_grad_(True)
    return twin


def save(model: Any, directory: Path) -> None:
    """What AdapterHub's library writes, of an adapter of preset options or not."""
    directory.mkdir()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_file(
        {n: p.detach().clone() for n, p in trained.items()},
        directory / "adapter.safetensors",
    )
    bottleneck = next(m for m in model.modules() if isinstance(m, Bottleneck))
    size, width = bottleneck.adapter_up.weight.shape
    names = {f: name for name, f in ACTIVATIONS.items()}
    described = {
        "name": NAME,
        "model_type": model.config.model_type,
        "hidden_size": size,
        "modules_to_save": "classifier" if hasattr(model, "classifier") else None,
        "config": {
            "mh_adapter": bottleneck.reads == "output",
            "output_adapter": True,
            "reduction_factor": size / width,
            "non_linearity": names[bottleneck.f],
            "original_ln_before": bottleneck.reads == "sum",
            "original_ln_after": True,
            "ln_before": False,
            "ln_after": False,
            "init_weights": "bert",
            "is_parallel": bottleneck.reads == "residual",
            "scaling": bottleneck.scaling,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "inv_adapter": None,
            "phm_layer": False,
        },
        "version": "adapters.1.3.0",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))


def load(twin: Any, directory: Path, kind: str, **options: Any) -> Any:
    """A copy of a torch model with the adapters of a directory."""
    described = json.loads((directory / "adapter_config.json").read_text())
    name = described["name"]
    stored = load_file(directory / "adapter.safetensors")
    renamed = {
        key.replace(f".adapters.{name}.", f".adapters.{NAME}."): value
        for key, value in stored.items()
    }
    model = make(copy.deepcopy(twin), kind, **options)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert renamed.keys() == wanted
    model.load_state_dict(renamed, strict=False)
    return model.eval()
