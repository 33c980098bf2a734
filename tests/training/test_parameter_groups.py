"""Decay and rates of each parameter: torch's AdamW, with transformers' own groups.

Each parameter gets random numbers and gradients on both sides, so no model runs.
"""

import re
from typing import Any

import jax
import numpy as np
import peft
import pytest
import tiny
import tiny_encoders
import tiny_seq2seq
import torch
import transformers
from tiny_experiment import make_config

from fjft import sharding
from fjft.build import build_experiment, override
from fjft.errors import UserError
from fjft.optimize.updating import update_each
from fjft.training.groups import find_decayed
from fjft.training.program import build_program

OPTIONS = {
    "optimizer__learning_rate": 0.01,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0.0,
    "optimizer__weight_decay": 0.3,
    "optimizer__layer_decay": 0.5,
}
# A model, what follows on its layers, and the numbers of layers before its end.
CASES = {
    "llama/llama3-rope-biases": ("causal_lm", r"^(model\.norm|lm_head)\."),
    "qwen3/alternating-biases": ("causal_lm", r"^(model\.norm|lm_head)\."),
    "gpt2/scaled-by-layer": ("causal_lm", r"^transformer\.ln_f\."),
    "modernbert/biases-mean/sequence_classification": (
        "sequence_classification",
        r"^(model\.final_norm|head|classifier)\.",
    ),
    "distilbert/relu/sequence_classification": (
        "sequence_classification",
        r"^(pre_)?classifier\.",
    ),
    "t5/relu-tied": ("seq2seq", r"^(en|de)coder\.final_layer_norm\.|^lm_head\."),
}


def torch_model(case):
    family = case.split("/")[0]
    if case in tiny_encoders.CASES:
        return tiny_encoders.torch_model(case)
    return (tiny if family in tiny.CONFIGS else tiny_seq2seq).torch_model(case)


def build(config, twin):
    """The program that trains a model, from shapes."""
    mesh = sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        files, experiment = tiny.memory_files(twin), build_experiment(config)
        return build_program(experiment, mesh, files, 10, twin.config.num_labels)


def find_decayed_by_trainer(model):
    """The names that transformers lets decay."""
    trainer: Any = None  # It asks nothing of itself.
    return transformers.Trainer.get_decay_parameter_names(trainer, model)


def find_layer(name):
    """The number of a layer in its half of the model, where a name has one."""
    found = re.search(r"(?:^|\.)(?:layer|layers|h|block)\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_torchs_with_groups(case, tmp_path):
    objective, above = CASES[case]
    twin, random = torch_model(case), np.random.default_rng(0)
    config = make_config("unused", tmp_path, **OPTIONS, **{"peft.method": "full"})
    config.objective = {"name": objective}
    program = build(config, twin)
    drawn = {
        name: [random.standard_normal(p.shape).astype(np.float32) for _ in range(4)]
        for name, p in twin.named_parameters()
    }
    decayed = find_decayed_by_trainer(twin)
    parameters, groups = {}, []
    for name, (start, *_) in drawn.items():
        half = "".join(re.findall(r"^(?:en|de)coder\.", name))
        layers = [find_layer(other) for other in drawn if other.startswith(half)]
        depth = 1 + max(number for number in layers if number is not None)
        layer = find_layer(name)
        steps = depth + 1 if layer is None else depth - layer
        steps = 0 if re.search(above, name) else steps
        parameters[name] = torch.nn.Parameter(torch.tensor(start))
        decay = 0.3 if name in decayed else 0.0
        groups.append(
            {"params": parameters[name], "lr": 0.01 * 0.5**steps, "weight_decay": decay}
        )
    theirs = torch.optim.AdamW(groups)
    sites = program.blueprint.sites
    params, *grads = (
        {
            site.path: tiny.gather(site, {name: d[i] for name, d in drawn.items()})
            for site in sites
        }
        for i in range(4)
    )
    assert params.keys() == program.state_shapes.params.keys()
    state = program.optimizer.init(params)
    for number, grad in enumerate(grads, 1):
        params, state, _ = update_each(
            program.optimizer, grad, state, params, jax.numpy.bool_(True)
        )
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(drawn[name][number])
        theirs.step()
    after = {name: p.detach().numpy() for name, p in parameters.items()}
    for site in sites:
        np.testing.assert_allclose(
            params[site.path], tiny.gather(site, after), atol=1e-6, err_msg=site.path
        )


@pytest.mark.parametrize(
    ("method", "options", "theirs"),
    [
        ("lora", {"use_dora": True}, peft.LoraConfig(use_dora=True)),
        ("ia3", {}, peft.IA3Config()),
        ("vera", {}, peft.VeraConfig()),
        ("layer_norm", {}, peft.LNTuningConfig()),
    ],
)
def test_adapters_decay_as_pefts(method, options, theirs, tmp_path):
    """Vectors that are neither biases nor norms do, if their names do not say so."""
    twin = tiny.torch_model("llama/linear-rope-tied")
    theirs.target_modules = {"q_proj", "down_proj"}
    if method == "ia3":
        theirs.feedforward_modules = {"down_proj"}
    options |= {"target_modules": r"q_proj|down_proj"}
    if method == "layer_norm":
        theirs.target_modules, options = (
            {"input_layernorm", "post_attention_layernorm", "norm"},
            {},
        )
    config = make_config("unused", tmp_path)
    config.peft = {"method": method, **options}
    program, experiment = build(config, twin), build_experiment(config)
    model = peft.get_peft_model(tiny.make_torch(twin.config), theirs)
    names = find_decayed_by_trainer(model)
    expected = {
        name.replace(".default", "").removesuffix(".weight"): name in names
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    found = find_decayed(experiment, program.blueprint, program.state_shapes.params)
    tensors = experiment.method.peft_tensors(
        program.blueprint.model, program.blueprint.sites, experiment.peft
    )
    trained = [tensor for tensor in tensors if tensor.path in found]
    ours = {
        tensor.name.removesuffix(".weight"): found[tensor.path] for tensor in trained
    }
    assert ours == expected


def test_layers_updated_one_by_one_have_one_rate(tmp_path):
    twin = tiny.torch_model("llama/linear-rope-tied")
    config = make_config("unused", tmp_path, **OPTIONS, optimizer__offload=True)
    with pytest.raises(UserError, match=r"layer_decay=0\.5 does not go with"):
        build(config, twin)
    override(config, {"optimizer.layer_decay": 1.5})
    with pytest.raises(UserError, match=r"layer_decay=1\.5 is not in \(0, 1\]"):
        build(config, twin)
