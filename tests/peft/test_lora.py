"""LoRA against `peft` itself: numbers, files both ways, and what is trained."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_twins
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.generation import decode
from fjft.models.layers import Linear, Maker, Rngs
from fjft.peft import lora
from fjft.peft.lora_adapter import Adapter

UNTIED, TIED = "llama/llama3-rope-biases", "qwen2/no-window-tied"
ALTERNATING = "qwen3/alternating-biases"
T = 20

PATTERNS = {
    "rank_pattern": {"q_proj": 5, r"layers\.1\.self_attn\.v_proj": 2},
    "alpha_pattern": {r"layers\.[02]\.mlp\.up_proj": 3, "v_proj": 40},
}
# Case, PEFT's options, ours.
VARIANTS = {
    "list": (
        UNTIED,
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "q_proj|v_proj"},
    ),
    "regex-on-some-layers": (
        UNTIED,
        {"target_modules": r".*\.[12]\.self_attn\.(q|o)_proj"},
        {"target_modules": r".*\.[12]\.self_attn\.(q|o)_proj"},
    ),
    "layers-to-transform": (
        ALTERNATING,
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 3]},
        {"target_modules": r"layers\.[03]\..*(k_proj|up_proj)"},
    ),
    "one-layer-of-a-named-stack": (
        UNTIED,
        {
            "target_modules": ["down_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
        {"target_modules": r"layers\.1\.mlp\.down_proj"},
    ),
    "all-linear": (
        ALTERNATING,
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear"},
    ),
    "patterns-rslora": (
        ALTERNATING,
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, **PATTERNS},
        {"target_modules": "q_proj|v_proj", "use_rslora": True, **PATTERNS},
    ),
}
COMMON = {"r": 3, "lora_alpha": 7}


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant of LoRA: base models, and `peft`'s model with random adapters."""

    twins: tiny.Twins
    theirs: object
    directory: object
    config: lora.Config

    def build(self, **options):
        return tiny.build_model(self.twins.directory, lora, self.config, **options)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, get_twins, tmp_path_factory):
    name, theirs, ours = VARIANTS[request.param]
    twins = get_twins(name)
    model = peft_twins.make_peft(twins.torch, **COMMON, **theirs)
    peft_twins.randomize(model)
    directory = tmp_path_factory.mktemp("peft")
    model.save_pretrained(directory)
    return Case(twins, model, directory, lora.Config(**COMMON, **ours))


def test_what_peft_wrote_loads_here_with_its_logits(case, record_property):
    ours = peft_twins.load(case.twins.directory, case.directory)
    assert_error = peft_twins.assert_same_logits(ours, case.theirs, 1e-4)
    record_property("max_error", assert_error)
    scale = np.abs(tiny.torch_logits(case.theirs, tiny.random_ids(2, T))).max()
    assert assert_error / scale < 1e-5


def test_what_is_written_here_loads_in_peft_with_our_logits(
    case, tmp_path, record_property
):
    ours = peft_twins.scatter(case.build())
    fjft.save_adapter(ours, tmp_path)
    theirs = peft_twins.load_peft(case.twins.torch, tmp_path)
    error = peft_twins.assert_same_logits(ours, theirs, 1e-4)
    record_property("max_error", error)
    # PEFT writes the same names and shapes for the same adapter.
    written, expected = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path, case.directory)
    )
    shapes = {name: array.shape for name, array in expected.items()}
    assert {name: array.shape for name, array in written.items()} == shapes


def test_an_adapter_loaded_and_saved_is_the_same_bit_for_bit(case, tmp_path):
    fjft.save_adapter(peft_twins.load(case.twins.directory, case.directory), tmp_path)
    written, expected = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path, case.directory)
    )
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)
    peft_twins.assert_same_logits(
        fjft.load_model(str(case.twins.directory), adapter=tmp_path), case.theirs, 1e-4
    )


def test_the_same_tensors_are_trained_as_in_peft(case):
    ours = case.build()
    theirs = peft_twins.trained_by_peft(case.theirs)
    tensors = {tensor.name: tensor for tensor in peft_twins.table(ours)}
    assert tensors.keys() == theirs.keys()
    _, params = tree.split(ours)
    for name, tensor in tensors.items():
        assert params[tensor.path][tensor.index].shape == tuple(theirs[name].shape)
    trainable = peft_twins.is_trainable(ours)
    assert {t.path for t in tensors.values()} == set(filter(trainable, params))
    count, _ = case.theirs.get_nb_trainable_parameters()
    assert lora.num_trainable(ours, ours.provenance.sites, case.config) == count


def test_merged_equals_adapted(case):
    ours = peft_twins.load(case.twins.directory, case.directory)
    merged = fjft.merge_adapter(ours)
    ids = tiny.random_ids(2, T)
    expected = tiny.jit_apply(ours)(ids)
    error = tiny.max_error(tiny.jit_apply(merged)(ids), expected)
    assert error < 1e-5 * np.abs(expected).max()
    # The given model is left as it was, and the merged one is a plain model.
    np.testing.assert_array_equal(tiny.jit_apply(ours)(ids), expected)
    base, after = (tree.split(m)[1] for m in (case.twins.model, merged))
    assert {path: p.shape for path, p in after.items()} == {
        path: p.shape for path, p in base.items()
    }


def test_adapters_start_as_pefts_do(get_twins):
    twins = get_twins(ALTERNATING)
    theirs = peft_twins.make_peft(twins.torch, r=16, target_modules="all-linear")
    theirs = peft_twins.trained_by_peft(theirs)
    config = lora.Config(r=16)
    ours = tiny.build_model(twins.directory, lora, config)
    _, params = tree.split(ours)
    standard = {"ours": [], "theirs": []}
    for tensor in peft_twins.table(ours):
        value = np.asarray(params[tensor.path][tensor.index])
        expected = theirs[tensor.name].detach().numpy()
        if tensor.name.endswith("lora_B.weight"):
            assert not value.any()
            assert not expected.any()
            continue
        bound = 1 / np.sqrt(value.shape[1])
        assert 0.95 * bound < np.abs(value).max() <= bound
        assert 0.95 * bound < np.abs(expected).max() <= bound
        standard["ours"].append(value.ravel() / bound)
        standard["theirs"].append(expected.ravel() / bound)
    ours, theirs = (np.sort(np.concatenate(v)) for v in standard.values())
    # Kolmogorov-Smirnov: quantiles of ~25,000 numbers differ by less than 2 %.
    assert np.abs(ours - theirs).max() < 2 * 0.02


def test_new_adapters_depend_on_the_seed_alone(get_twins):
    twins = get_twins(UNTIED)
    mesh = sharding.make_mesh(sharding.Config(fsdp=4, tensor=2))

    def start(**options):
        model = tiny.build_model(twins.directory, lora, lora.Config(), **options)
        return np.asarray(model.layers.blocks[0].attention.q.adapter.a[...])

    np.testing.assert_array_equal(start(seed=5), start(seed=5, mesh=mesh))
    assert not np.array_equal(start(seed=5), start(seed=6))


def _adapted(dropout: float, size: int = 64) -> Linear:
    """A map that gives twice its input, with an adapter that adds its own."""
    maker = Maker(Rngs(0), jnp.float32)
    sizes, axes = (size, size), ("heads", "embed")
    linear: Any = Linear(maker, "q", sizes, axes, bias=False, std=1.0)
    adapter = Adapter(Rngs(0), linear, (size,), (1.0,), dropout=dropout)
    adapter.a[...] = adapter.b[...] = jnp.eye(size)
    linear.weight[...] = 2 * jnp.eye(size)
    linear.adapter = nnx.data(adapter)
    return linear


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(dropout):
    x, y = jnp.ones((200, 64)), jnp.full((200, 64), 2.0)
    linear = _adapted(dropout)
    np.testing.assert_array_equal(linear(x), x + y)
    out = np.asarray(linear(x, jax.random.key(0)) - y)
    kept = out != 0
    np.testing.assert_allclose(out[kept], 1 / (1 - dropout), rtol=1e-6)
    assert (~kept).mean() == pytest.approx(dropout, abs=0.02)
    assert out.mean() == pytest.approx(1, abs=0.03)
    again = np.asarray(linear(x, jax.random.key(1)) - y)
    assert ((out != 0) != (again != 0)).any()


def test_dropout_is_for_training_alone_and_differs_by_layer_and_map(get_twins):
    twins = get_twins(UNTIED)
    config = lora.Config(r=4, lora_dropout=0.4)
    model = peft_twins.scatter(tiny.build_model(twins.directory, lora, config))
    plain = peft_twins.scatter(
        tiny.build_model(twins.directory, lora, lora.Config(r=4))
    )
    ids = tiny.random_ids(2, T)
    expected = tiny.jit_apply(plain)(ids)
    np.testing.assert_array_equal(tiny.jit_apply(model)(ids), expected)

    def train(key):
        x = model.embed(jnp.asarray(ids))
        positions = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (2, 1))
        ones = jnp.ones((2, T), jnp.int32)
        x, _ = model.backbone(x, positions, ones, rng=jax.random.key(key))
        return np.asarray(x)

    np.testing.assert_array_equal(train(0), train(0))
    assert not np.array_equal(train(0), train(1))


def test_embeddings_that_peft_adds_to_its_files_are_passed_over(get_twins, tmp_path):
    twins = get_twins(UNTIED)
    theirs = peft_twins.randomize(
        peft_twins.make_peft(twins.torch, target_modules=["embed_tokens", "lm_head"])
    )
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".base_layer." in name for name in names)
    ours = peft_twins.load(twins.directory, tmp_path)
    peft_twins.assert_same_logits(ours, theirs, 1e-4)


@pytest.mark.parametrize("case_name", [UNTIED, TIED])
def test_a_cache_sees_adapted_embeddings_and_heads(get_twins, case_name):
    config = lora.Config(r=2, target_modules="embed_tokens|lm_head")
    ours = tiny.build_model(get_twins(case_name).directory, lora, config)
    prompt = [5, 9, 4]
    options = decode.Config(max_new_tokens=6, stop_token_ids=())
    before = decode.generate_tokens(ours, [prompt], options)
    peft_twins.scatter(ours)
    made = decode.generate_tokens(ours, [prompt], options)
    assert made != before
    ids = np.array([prompt + made[0]], np.int32)
    logits = tiny.jit_apply(ours)(ids)
    assert made[0] == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"r": 5}, {"target_modules": ["q_proj"]}],
    ids=["other-model", "rank-changed-by-hand", "other-modules"],
)
def test_an_adapter_for_another_model_is_refused(get_twins, tmp_path, options):
    theirs = peft_twins.make_peft(
        get_twins(UNTIED).torch, r=4, target_modules="all-linear"
    )
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    name = UNTIED if options else ALTERNATING
    with pytest.raises(UserError, match="adapter for another model"):
        peft_twins.load(get_twins(name).directory, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"peft_type": "MAGIC"}, "MAGIC"),
    ],
)
def test_parts_of_peft_that_are_missing_here_are_refused_by_name(
    get_twins, tmp_path, changes, message
):
    twins = get_twins(UNTIED)
    peft_twins.make_peft(twins.torch).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        peft_twins.load(twins.directory, tmp_path)


@pytest.mark.parametrize(
    ("case_name", "options", "message"),
    [
        (UNTIED, {"target_modules": "qproj"}, r"matches no module.*'q_proj'"),
        (UNTIED, {"target_modules": "q_proj("}, "is not a regex"),
        (UNTIED, {"target_modules": "lm_head", "use_dora": True}, "plain LoRA only"),
        (
            TIED,
            {"target_modules": "embed_tokens", "init_lora_weights": "pissa"},
            "plain LoRA only",
        ),
        (UNTIED, {"modules_to_save": "classifier"}, r"matches no module.*'lm_head'"),
        (TIED, {"modules_to_save": "lm_head"}, "matches no module"),
        (TIED, {"modules_to_save": "embed_tokens"}, "ties its embeddings"),
        (UNTIED, {"modules_to_save": r"layers\.0\.mlp\.up_proj"}, "some layers"),
    ],
)
def test_a_pattern_that_cannot_be_had_is_refused(
    get_twins, case_name, options, message
):
    with pytest.raises(UserError, match=message):
        tiny.build_model(get_twins(case_name).directory, lora, lora.Config(**options))


@pytest.mark.parametrize(
    "options",
    [{"r": 0}, {"rank_pattern": {"q_proj": 0}}, {"lora_dropout": 1.0}],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError):
        lora.Config(**options)
