"""Every encoder-decoder family against `transformers` in torch."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import perturb
import pytest
import tiny
import tiny_seq2seq
import torch
import transformers
from safetensors.torch import load_file

import fjft
from fjft import sharding, tree
from fjft.errors import UserError
from fjft.models.encoder_decoder import EncoderDecoder, shift_tokens_right
from fjft.models.families import FAMILIES
from fjft.models.fields import Fields
from fjft.models.layers import Maker, Rngs
from fjft.peft import last_layers, lora

B, E, T = 2, 21, 13
TOLERANCE = 1e-4
made: dict[str, tiny_seq2seq.Twins] = {}


@pytest.fixture(scope="module", params=tiny_seq2seq.CASES)
def twins(request, tmp_path_factory):
    """Every tiny encoder-decoder in turn."""
    case = request.param
    if case not in made:
        directory = tmp_path_factory.mktemp("hf")
        made[case] = tiny_seq2seq.make_twins(case, directory)
    return made[case]


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """What the two halves read."""
    return {
        "input_ids": tiny_seq2seq.random_ids(B, E, seed=seed),
        "decoder_input_ids": tiny_seq2seq.random_ids(B, T, seed=seed + 1),
    }


def test_every_family_has_tiny_models():
    families = {
        name for name, family in FAMILIES.items() if family.MODEL is EncoderDecoder
    }
    assert set(tiny_seq2seq.CONFIGS) == families


def test_logits_equal_torch(twins, record_property):
    batch = make_batch()
    error = tiny.max_error(
        twins.apply(**batch), tiny_seq2seq.torch_logits(twins.torch, **batch)
    )
    record_property("max_error", error)
    assert error < TOLERANCE


def test_padded_logits_equal_torch(twins, record_property):
    batch = make_batch()
    mask, decoder_mask = np.ones((B, E), np.int32), np.ones((B, T), np.int32)
    mask[0, -7:], decoder_mask[1, -4:] = 0, 0
    ours = twins.apply(**batch, segment_ids=mask, decoder_segment_ids=decoder_mask)
    theirs = tiny_seq2seq.torch_logits(
        twins.torch, **batch, attention_mask=mask, decoder_attention_mask=decoder_mask
    )
    error = tiny.max_error(ours[decoder_mask == 1], theirs[decoder_mask == 1])
    record_property("max_error", error)
    assert error < TOLERANCE
    assert np.isfinite(ours).all()


def test_padding_on_the_left_changes_nothing(twins):
    batch, mask = make_batch(), np.ones((B, E), np.int32)
    mask[0, -7:] = 0
    right = twins.apply(**batch, segment_ids=mask)
    rolled = {k: v.copy() for k, v in batch.items()}
    rolled["input_ids"][0] = np.roll(batch["input_ids"][0], 7)
    mask[0] = np.roll(mask[0], 7)
    left = twins.apply(**rolled, segment_ids=mask)
    assert tiny.max_error(left, right) < TOLERANCE


def test_packed_logits_equal_each_pair_alone(twins, record_property):
    batch = make_batch()
    rows = [[(9, 6), (12, 7)], [(5, 3), (7, 5), (6, 2)]]
    segments = {"segment_ids": np.zeros((B, E), np.int32)}
    segments["decoder_segment_ids"] = np.zeros((B, T), np.int32)
    alone = []
    for b, pairs in enumerate(rows):
        start = [0, 0]
        for number, sizes in enumerate(pairs, 1):
            parts = {}
            for i, (ids, where) in enumerate(zip(batch, segments, strict=True)):
                here = slice(start[i], start[i] + sizes[i])
                segments[where][b, here] = number
                parts[ids] = batch[ids][b : b + 1, here]
                start[i] += sizes[i]
            alone.append(tiny_seq2seq.torch_logits(twins.torch, **parts)[0])
    ours = twins.apply(**batch, **segments)
    real = segments["decoder_segment_ids"] > 0
    error = tiny.max_error(ours[real], np.concatenate(alone))
    record_property("max_error", error)
    assert error < TOLERANCE


def test_cached_decoding_equals_the_full_pass(twins, record_property):
    graphdef, params = tree.split(twins.model)
    batch = make_batch()
    mask = np.ones((B, E), np.int32)
    mask[1, :4] = 0
    full = twins.apply(**batch, segment_ids=mask)

    @jax.jit
    def run(params, input_ids, mask, decoder_input_ids):
        model = tree.merge(graphdef, params)
        cache = model.init_cache(model.encode(input_ids, None, mask), T + 2)

        def step(cache, xs):
            ids, position = xs
            x, cache = model.backbone(
                model.embed(ids[:, None]),
                jnp.full((B, 1), position),
                jnp.ones((B, 1), jnp.int32),
                cache=cache,
            )
            return cache, model.unembed(x)[:, 0]

        cache, logits = jax.lax.scan(step, cache, (decoder_input_ids.T, jnp.arange(T)))
        return jnp.swapaxes(logits, 0, 1), cache.tokens.length

    logits, length = run(
        params, *(batch["input_ids"], mask, batch["decoder_input_ids"])
    )
    error = tiny.max_error(logits, full)
    record_property("max_error", error)
    assert error < TOLERANCE
    assert int(length) == T


def _tensors(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_loaded_is_saved_bit_for_bit(twins, dtype, tmp_path):
    twin = copy.deepcopy(twins.torch).to(getattr(torch, dtype))
    twin.save_pretrained(tmp_path / "before")
    model = fjft.load_model(str(tmp_path / "before"), dtype="auto")
    fjft.save_model(model, tmp_path / "after")
    before, after = _tensors(tmp_path / "before"), _tensors(tmp_path / "after")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "after", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert type(loaded) is type(twin)
    batch = make_batch()
    np.testing.assert_array_equal(
        tiny_seq2seq.torch_logits(loaded.to(twin.dtype), **batch),
        tiny_seq2seq.torch_logits(twin, **batch),
    )
    assert loaded.config.to_dict() == twin.config.to_dict() | {
        "_name_or_path": str(tmp_path / "after")
    }
    written = tmp_path / "after" / "generation_config.json"
    assert written.read_text() == (
        (tmp_path / "before" / "generation_config.json").read_text()
    )


def test_every_parameter_has_axes_that_divide_on_a_mesh(twins):
    _, params = tree.split(twins.model)
    axes = tree.logical_axes(twins.model)
    assert axes.keys() == params.keys()
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        assert set(names) - {None} <= set(sharding.RULES), path
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    model = tiny.build_model(twins.directory, mesh=mesh)
    batch = {k: jnp.asarray(v) for k, v in make_batch().items()}
    graphdef, params = tree.split(model)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda p, b: tree.merge(graphdef, p)(**b))(params, batch)
    assert tiny.max_error(logits, twins.apply(**make_batch())) < TOLERANCE


def test_new_weights_are_as_transformers_makes_them(twins):
    config = tiny_seq2seq.make_config(twins.case)
    torch.manual_seed(1)
    twin = transformers.AutoModelForSeq2SeqLM.from_config(config)
    theirs = {name: p.detach().numpy() for name, p in twin.state_dict().items()}
    family = FAMILIES[config.model_type]
    arch = family.architecture(Fields(config))
    model = family.MODEL(arch, Maker(Rngs(0), jnp.float32), "float32")
    params = tree.split(model)[1]
    for site in family.rows(arch) and twins.model.provenance.sites:
        if site.path == "lm_head.weight":
            continue  # transformers makes tied ones only
        ours, expected = np.asarray(params[site.path]), tiny.gather(site, theirs)
        assert ours.shape == expected.shape
        margin = 5 / np.sqrt(ours.size)
        assert ours.std() == pytest.approx(expected.std(), rel=margin, abs=0), site.path
        assert ours.mean() == pytest.approx(
            expected.mean(), abs=2 * margin * expected.std()
        ), site.path
    if arch.pads_embedding:
        assert not np.asarray(params["embedding.weight"][arch.pad_token_id]).any()


OTHER_VALUES = {
    "feed_forward_proj": ["relu", "gated-gelu", "gated-relu", "hardswish"],
    "activation_function": ["relu", "hardswish"],
    "tie_word_embeddings": [True, False],
    "architectures": [["T5EncoderModel"]],
    "quantization_config": [{"quant_method": "fp8"}],
}
SMALL_T5 = {"num_layers": 1, "num_decoder_layers": 1}
SMALL_BART = {"encoder_layers": 1, "decoder_layers": 1}


def _small(family: str, **changes):
    case = f"{family}/{next(iter(tiny_seq2seq.CONFIGS[family]))}"
    small = SMALL_T5 if family.endswith("t5") else SMALL_BART
    return tiny_seq2seq.make_config(case, **(small | changes))


@pytest.mark.parametrize("family", tiny_seq2seq.CONFIGS)
def test_no_field_of_a_config_is_passed_over(family):
    """Logits follow torch's, or loading refuses with the field's name."""
    ids = {"input_ids": tiny_seq2seq.random_ids(1, 14)}
    ids["decoder_input_ids"] = tiny_seq2seq.random_ids(1, 5)
    base = tiny_seq2seq.torch_logits(tiny_seq2seq.make_torch(_small(family)), **ids)
    refused, followed = set(), set()
    fields = _small(family).to_dict()
    for name, value in {**fields, **dict.fromkeys(OTHER_VALUES)}.items():
        if name in perturb.NOT_FIELDS:
            continue
        others = OTHER_VALUES.get(name) or perturb.other_numbers(value)[:1]
        for other in others:
            try:
                twin = tiny_seq2seq.make_torch(_small(family, **{name: other}))
                theirs = tiny_seq2seq.torch_logits(twin, **ids)
            except Exception:  # transformers has no one way to refuse
                continue
            if name == "architectures":
                twin.config.architectures = other
            try:
                model = tiny.build_model(memory_files(twin))
            except UserError as error:
                refusal = error
                spoken = "activation" if name == "feed_forward_proj" else name
                assert (
                    spoken in str(refusal)
                    or str(other) in str(refusal)
                    or (other[0] in str(refusal))
                ), refusal
                refused.add(name)
                continue
            with jax.disable_jit():
                ours = model(**{k: jnp.asarray(v) for k, v in ids.items()})
            assert tiny.max_error(ours, theirs) < TOLERANCE, (name, other)
            if theirs.shape != base.shape or tiny.max_error(theirs, base) > TOLERANCE:
                followed.add(name)
    assert {"quantization_config", "architectures"} <= refused
    assert len(followed) >= 6


def memory_files(twin):
    """A torch model as if it lay in a directory: tied tensors once."""
    tied = set(twin.all_tied_weights_keys)
    arrays = {
        name: tiny.to_numpy(x)
        for name, x in twin.state_dict().items()
        if name not in tied
    }
    files = tiny.memory_files(twin)
    return dataclasses.replace(files, tensors=tiny.MemorySource(arrays))


def test_labels_are_shifted_as_transformers_does(twins):
    labels = np.array([[7, 8, 9, 2], [11, 2, -100, -100]], np.int32)
    arch = twins.model.arch
    ours = shift_tokens_right(jnp.asarray(labels), arch)
    theirs = twins.torch.prepare_decoder_input_ids_from_labels(torch.tensor(labels))
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_what_is_missing_is_named(twins):
    ids = jnp.asarray(make_batch()["input_ids"])
    with pytest.raises(UserError, match="decoder_input_ids"):
        twins.model(ids)


def test_the_last_layers_are_the_decoders(twins):
    config = last_layers.Config(num_layers=1)
    model = tiny.build_model(twins.directory, method=last_layers, peft_config=config)
    trainable = last_layers.is_trainable(config, model.provenance.sites)
    trained = {path for path in tree.split(model)[1] if trainable(path)}
    assert trained
    for site in model.provenance.sites:
        is_last = site.path.startswith("decoder.norm.") or (
            site.path.startswith("decoder.layers.")
            and all(
                re.search(r"decoder\.(block|layers)\.1\.", n) for n in site.hf_names
            )
        )
        assert (site.path in trained) == is_last, site.path


@pytest.mark.parametrize(
    "case",
    [
        "t5/gated-own-head",
        "mt5/gated-own-head",
        "bart/post-norm",
        "mbart/pre-norm",
        "marian/two-vocabularies",
    ],
)
def test_an_adapter_goes_to_peft_and_back(case, tmp_path, record_property):
    import peft

    twin = tiny_seq2seq.torch_model(case)
    twin.save_pretrained(tmp_path / "base")
    names = "q|k|v" if "t5/" in case else "q_proj|k_proj|v_proj"
    config = lora.Config(r=3, lora_alpha=5, target_modules=names)
    model = tiny.build_model(tmp_path / "base", method=lora, peft_config=config)
    graphdef, params = tree.split(model)
    rng = np.random.default_rng(0)
    for path, value in params.items():
        if path.endswith(".adapter.b"):
            noise = rng.normal(0, 0.3, value.shape).astype(np.float32)
            params[path] = jnp.asarray(noise)
    provenance, model = model.provenance, tree.merge(graphdef, params)
    model.provenance = provenance
    fjft.save_adapter(model, tmp_path / "adapter")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    batch = make_batch()
    ours = tiny_seq2seq.jit_apply(model)(**batch)
    expected = tiny_seq2seq.torch_logits(theirs, **batch)
    error = tiny.max_error(ours, expected)
    record_property("max_error", error)
    assert error < TOLERANCE
    assert tiny.max_error(ours, tiny_seq2seq.torch_logits(twin, **batch)) > 0.01
    theirs.save_pretrained(tmp_path / "again")
    before, after = (
        load_file(tmp_path / d / "adapter_model.safetensors")
        for d in ("adapter", "again")
    )
    assert before.keys() == after.keys()
    again = fjft.load_model(str(tmp_path / "base"), adapter=tmp_path / "again")
    for path, value in tree.split(again)[1].items():
        np.testing.assert_array_equal(value, params[path])
