"""Models quantized while they are loaded, trained beside, and written whole."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import fjft
from fjft import sharding, tree
from fjft.blueprint import draw_model
from fjft.checkpoint.huggingface import save_model
from fjft.checkpoint.orbax import digest
from fjft.checkpoint.quantizing import is_quantized, restore_weights
from fjft.errors import UserError
from fjft.models.codes import FORMATS
from fjft.models.weights import module_at
from fjft.objectives import causal_lm
from fjft.peft import full, last_layers, lora
from fjft.training.flops import multiplied

MESH = (2, 2, 2)
LORA = lora.Config(r=4, target_modules="q_proj|down_proj|gate_proj")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint whose rows are whole blocks, cut over two devices too."""
    config = tiny.make_config(
        "llama/llama3-rope-biases",
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        head_dim=32,
    )
    directory = tmp_path_factory.mktemp("blocks")
    tiny.save_torch(tiny.make_torch(config), directory)
    return fjft.checkpoint.source.open_model(str(directory))


@pytest.fixture(scope="module")
def whole(files):
    return tiny.build_model(files)


def matrices(model, sites):
    """The sites of quantized weights."""
    return [s for s in sites if s.path not in tree.split(model)[1]]


@pytest.mark.parametrize("name", ["nf4_double", "fp8"])
def test_each_layer_is_quantized_as_it_is_alone(files, whole, name):
    model = tiny.build_model(files, quantization=name)
    params, quantize = tree.split(model)[1], jax.jit(FORMATS[name].quantize)
    chosen = matrices(model, model.provenance.sites)
    leaves = {site.module.rpartition(".")[2] for site in chosen}
    assert leaves == {"q", "k", "v", "o", "gate", "up", "down"}
    for site in chosen[:2] + chosen[-1:]:
        for layer, full_matrix in enumerate(module_at(whole, site.path)[...]):
            for part, value in quantize(full_matrix).items():
                stored = params[f"{site.path}.{part}"][layer]
                assert stored.dtype == value.dtype
                np.testing.assert_array_equal(stored, value, strict=True)


def test_a_mesh_holds_the_same_codes_and_says_the_same(files):
    name, mesh = "nf4_double", sharding.make_mesh(sharding.Config(*MESH))
    single = tiny.build_model(files, quantization=name)
    spread = tiny.build_model(files, quantization=name, mesh=mesh)
    one, many = tree.split(single)[1], tree.split(spread)[1]
    for path, value in one.items():
        np.testing.assert_array_equal(value, many[path], err_msg=path)
    assert digest(one) == digest(many)
    codes = many["layers.blocks.0.mlp.down.weight.codes"]
    assert codes.sharding.spec == sharding.spec(("layers", "mlp", "embed"))
    assert codes.sharding.shard_shape(codes.shape) == (3, 128, 64)
    ids = tiny.random_ids(4, 8)
    with jax.set_mesh(mesh):
        ours = tiny.jit_apply(spread)(ids)
    assert tiny.max_error(ours, tiny.jit_apply(single)(ids)) < 1e-4


def dequantized(model, whole):
    """The whole model with the numbers that the quantized one's codes stand for."""
    same = tree.merge(*tree.split(whole))
    for site in matrices(model, model.provenance.sites):
        weight = module_at(model, site.path)
        assert weight.shape == module_at(same, site.path).shape
        module_at(same, site.path)[...] = weight[...]
    return same


def test_lora_trains_as_on_the_numbers_that_codes_stand_for(files):
    options = {"method": lora, "peft_config": LORA}
    model = tiny.build_model(files, quantization="nf4", **options)
    twin = dequantized(model, tiny.build_model(files, **options))
    batch = jax.tree.map(jnp.asarray, tiny.make_batch([[9, 7], [16]], 16))

    def loss(model):
        graphdef, params = tree.split(model)
        trained, frozen = tree.partition(params, lambda p: p.endswith((".a", ".b")))
        trained = {p: v + 0.02 for p, v in trained.items()}

        def of(trained):
            merged = tree.merge(graphdef, frozen, trained)
            config = causal_lm.Config()
            return causal_lm.loss(merged, batch, config, rng=None, remat="full").loss

        return jax.jit(jax.value_and_grad(of))(trained)

    (ours, our_grads), (theirs, their_grads) = loss(model), loss(twin)
    assert abs(float(ours) / float(theirs) - 1) < 1e-6
    for path, grad in our_grads.items():
        assert grad.dtype == jnp.float32
        assert tiny.relative_error(grad, their_grads[path]) < 1e-4, path


def test_the_backward_pass_holds_codes_and_no_weights(files):
    model = tiny.build_model(files, quantization="nf4")
    graphdef, params = tree.split(model)

    def apply(embedding):
        merged = tree.merge(graphdef, params | {"embedding.weight": embedding})
        return merged(jnp.asarray(tiny.random_ids(1, 4)))

    _, pull = jax.vjp(apply, params["embedding.weight"])
    held = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    shapes = {(leaf.shape, str(leaf.dtype)) for leaf in held}
    assert ((3, 256, 128), "uint4") in shapes
    assert not any(s[-2:] == (256, 128) and d != "uint4" for s, d in shapes)


def test_merging_goes_onto_the_weights_in_full_precision(files, tmp_path):
    adapted = tiny.build_model(files, lora, LORA)
    params = tree.split(adapted)[1]
    b = {p: jnp.full_like(v, 0.1) for p, v in params.items() if p.endswith("adapter.b")}
    tree.update(adapted, b)
    fjft.save_adapter(adapted, tmp_path)
    model = fjft.load_model(str(files.origin), adapter=tmp_path, quantization="nf4")
    merged = fjft.merge_adapter(model)
    assert is_quantized(model)
    assert not is_quantized(merged)
    theirs = tree.split(fjft.merge_adapter(adapted))[1]
    ours = tree.split(merged)[1]
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_no_file_has_what_quantization_changed(files, whole, tmp_path):
    model = tiny.build_model(files, quantization="int4")
    save_model(model, tmp_path / "ours")
    again = tree.split(fjft.load_model(str(tmp_path / "ours")))[1]
    for path, value in tree.split(whole)[1].items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    spread = sharding.make_mesh(sharding.Config(*MESH))
    restored = restore_weights(
        tiny.build_model(files, quantization="int4", mesh=spread)
    )
    for path, value in tree.split(restored)[1].items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_a_source_that_is_gone_is_named(files, tmp_path):
    model = tiny.build_model(files, quantization="int8")

    def gone(*args):
        raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

    tensors = types.SimpleNamespace(
        names=files.tensors.names,
        shape=files.tensors.shape,
        dtype=files.tensors.dtype,
        read=gone,
    )
    lost = dataclasses.replace(files, tensors=tensors)
    model.provenance = dataclasses.replace(model.provenance, files=lost)
    for write in (lambda: save_model(model, tmp_path), lambda: restore_weights(model)):
        with pytest.raises(UserError, match="cannot be read again from"):
            write()


def test_what_is_trained_is_not_quantized(files):
    config = last_layers.Config(num_layers=1)
    model = tiny.build_model(files, last_layers, config, quantization="int8")
    params = tree.split(model)[1]
    trainable = last_layers.is_trainable(config, model.provenance.sites)
    assert any(trainable(path) for path in params)
    for path in params:
        assert not (trainable(path) and path.endswith("codes"))
    assert params["layers.blocks.0.mlp.up.weight.codes"].shape[0] == 2
    assert params["layers.blocks.1.mlp.up.weight"].dtype == jnp.float32
    config = dataclasses.replace(LORA, modules_to_save="o_proj")
    kept = tree.split(tiny.build_model(files, lora, config, quantization="int8"))[1]
    assert "layers.blocks.0.attention.o.weight" in kept


def test_what_cannot_be_quantized_is_refused(files, get_twins):
    with pytest.raises(UserError, match=r"all linear maps are trained.*method=lora"):
        tiny.build_model(files, full, full.Config(), quantization="nf4")
    small = tiny.memory_files(tiny.torch_model("llama/linear-rope-tied"))
    with pytest.raises(UserError, match=r"48 inputs.*blocks of 64.*int8 or fp8"):
        tiny.build_model(small, quantization="nf4")
    experts = next(case for case in tiny.CASES if case.startswith("mixtral/"))
    routed = tiny.memory_files(tiny.torch_model(experts))
    with pytest.raises(UserError, match="routed experts"):
        tiny.build_model(routed, quantization="int8")
    with pytest.raises(UserError, match=r"quantization='nf5'.*'nf4_double'"):
        fjft.load_model(str(files.origin), quantization="nf5")
    mesh = sharding.make_mesh(sharding.Config(1, 4, 2))
    with pytest.raises(UserError, match=r"scales: axis 'embed' of size 2 .* = 4"):
        tiny.build_model(files, quantization="nf4", mesh=mesh)


def test_codes_count_as_numbers_and_scales_do_not(files):
    counts = []
    for quantization in ("", "nf4_double"):
        blueprint = draw_model(
            files,
            method=None,
            peft_config=None,
            dtype="float32",
            mesh=sharding.single_device_mesh(),
            quantization=quantization,
        )
        counts.append(multiplied(blueprint.params, blueprint))
    assert counts[0] == counts[1]
    assert tree.num_bytes(jnp.zeros((3, 4), jnp.uint4)) == 6


@pytest.mark.parametrize("name", ["nf4_double", "fp8"])
def test_a_digest_sees_every_code(name):
    parts = jax.jit(FORMATS[name].quantize)(jnp.linspace(-1, 1, 256).reshape(2, 128))
    changed = parts["codes"].at[3, 1].set(parts["codes"][0, 0])
    assert digest(parts) != digest(parts | {"codes": changed})
    assert json.dumps(digest(parts))
