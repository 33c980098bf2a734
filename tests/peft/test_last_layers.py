"""Training the last layers: the right ones, with the gradients of full training."""

import jax
import peft_twins
import pytest
import tiny

from fjft import tree
from fjft.errors import UserError
from fjft.peft import full, last_layers

CASES = ["llama/llama3-rope-biases", "qwen3/alternating-biases"]
T = 16


def _hf_names(model):
    trainable = peft_twins.is_trainable(model)
    return {
        name
        for site in model.provenance.sites
        if trainable(site.path)
        for name in site.hf_names
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_layers", [1, 2, "all"])
def test_the_last_layers_and_the_last_norm_are_trained(get_twins, case, num_layers):
    twins = get_twins(case)
    total = twins.torch.config.num_hidden_layers
    count = total if num_layers == "all" else num_layers
    config = last_layers.Config(num_layers=count)
    model = tiny.build_model(twins.directory, last_layers, config)
    inside = tuple(f"model.layers.{n}." for n in range(total - count, total))
    expected = {
        name: p
        for name, p in twins.torch.named_parameters()
        if name.startswith((*inside, "model.norm."))
    }
    assert _hf_names(model) == set(expected)
    assert last_layers.num_trainable(model, model.provenance.sites, config) == sum(
        p.numel() for p in expected.values()
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_full_training(get_twins, case):
    twins, batch = get_twins(case), tiny.make_batch([[T], [9, 7]], T)
    whole = tiny.build_model(twins.directory, full, full.Config())
    _, expected = peft_twins.mean_loss_gradients(whole, batch)
    by_name = _by_hf_name(whole, expected)
    config = last_layers.Config(num_layers=2)
    model = tiny.build_model(twins.directory, last_layers, config)
    _, grads = peft_twins.mean_loss_gradients(model, batch)
    ours = _by_hf_name(model, grads)
    assert set(ours) == _hf_names(model)
    for name, grad in ours.items():
        assert tiny.relative_error(grad, by_name[name]) < 1e-5, name


def _by_hf_name(model, grads):
    return {
        name: grads[site.path][place]
        for site in model.provenance.sites
        if site.path in grads
        for name, place in site.tensors()
    }


def test_the_backward_pass_stops_at_the_first_trained_layer(get_twins):
    """Counted in scanned layers, forward and back."""
    twins, batch = get_twins(CASES[0]), tiny.make_batch([[T], [T]], T)

    def scanned_layers(method, config):
        model = tiny.build_model(twins.directory, method, config)
        graphdef, params = tree.split(model)
        trained, frozen = tree.partition(params, peft_twins.is_trainable(model))
        arrays = jax.tree.map(jax.numpy.asarray, batch)

        def loss(trained):
            merged = tree.merge(graphdef, frozen, trained)
            x = merged.embed(arrays["input_ids"])
            x, _ = merged.backbone(x, arrays["positions"], arrays["segment_ids"])
            return (x * x).sum()

        return _scanned_layers(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)

    one = scanned_layers(last_layers, last_layers.Config(num_layers=1))
    assert one == [2, 1, 1]  # two frozen layers, the trained one, and that one back
    assert sum(scanned_layers(full, full.Config())) == 6


def _scanned_layers(jaxpr):
    return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


@pytest.mark.parametrize("num_layers", [0, -1, 4])
def test_a_count_that_the_model_does_not_have_is_refused(get_twins, num_layers):
    with pytest.raises(UserError, match=f"num_layers={num_layers}"):
        tiny.build_model(
            get_twins(CASES[0]).directory,
            last_layers,
            last_layers.Config(num_layers=num_layers),
        )
