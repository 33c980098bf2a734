"""Generation of encoder-decoders, and beam search, against transformers' own."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import tiny_seq2seq
import torch

import fjft
from fjft.errors import UserError
from fjft.generation import beam
from fjft.generation.decode import Config, generate_tokens, stream_tokens
from fjft.sharding import Config as MeshConfig
from fjft.sharding import make_mesh

PAD = 3
NEW = 12
STOP = (1, 11, 23, 30, 37, 41, 48)
# Options of generation that the tiny models' directories name.
SPECIAL = {
    "t5/relu-tied": {},
    "mt5/gated-own-head": {},
    "bart/post-norm": {"forced_eos_token_id": 2},
    "mbart/pre-norm": {"forced_bos_token_id": 9, "forced_eos_token_id": 2},
    "marian/two-vocabularies": {
        "bad_words_ids": [[PAD], [7, 8], [11]],
        "forced_eos_token_id": 11,
        "suppress_tokens": [31],
    },
}
DEFAULT = {"decoder_start_token_id": 5, "eos_token_id": list(STOP), "pad_token_id": PAD}


@pytest.fixture(scope="module", params=SPECIAL)
def seq2seq(request, tmp_path_factory):
    """A tiny encoder-decoder of every kind, with options of its own."""
    return make(request.param, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """One of them, for what does not depend on the family."""
    return make("t5/relu-tied", tmp_path_factory.mktemp("hf"))


def make(case, directory) -> tiny_seq2seq.Twins:
    twins = tiny_seq2seq.make_twins(case, directory)
    options = DEFAULT | SPECIAL[case]
    (directory / "generation_config.json").write_text(json.dumps(options))
    model = fjft.load_model(str(directory))
    return dataclasses.replace(twins, model=model)


def make_prompts(lengths=(3, 17, 9, 1), seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 50, length).tolist() for length in lengths]


def torch_generate(model, prompts, stop=STOP, side="right", **options):
    """New tokens of each row, up to the first stop token."""
    from transformers import GenerationConfig

    length = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        pads = length - len(prompt)
        before, after = (0, pads) if side == "right" else (pads, 0)
        ids.append([PAD] * before + prompt + [PAD] * after)
        mask.append([0] * before + [1] * len(prompt) + [0] * after)
    fixed = {"pad_token_id": PAD, "max_new_tokens": NEW, "do_sample": False}
    out = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        generation_config=GenerationConfig(**options),
        eos_token_id=list(stop) or None,
        **fixed,
    )
    start = 1 if model.config.is_encoder_decoder else length
    return [cut(row, stop) for row in out[:, start:].tolist()]


def cut(row, stop):
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1] if ends else row


def oracle(twins, prompts, **options):
    options = {"decoder_start_token_id": 5} | SPECIAL[twins.case] | options
    return torch_generate(twins.torch, prompts, **options)


def ours(model, prompts, **options):
    return generate_tokens(model, prompts, Config(max_new_tokens=NEW, **options))


def test_greedy_tokens_equal_transformers(seq2seq):
    prompts = make_prompts()
    assert ours(seq2seq.model, prompts) == oracle(seq2seq, prompts)


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_equal_transformers(seq2seq, num_beams):
    if num_beams == 2 and not seq2seq.case.startswith("t5"):
        pytest.skip("one family shows it")
    prompts = make_prompts()
    for early_stopping, length_penalty in (
        (False, 1.0),
        (False, -1.5),
        (True, 2.5),
        ("never", 1.0),
        ("never", -1.5),
    ):
        options = {
            "num_beams": num_beams,
            "early_stopping": early_stopping,
            "length_penalty": length_penalty,
        }
        expected = oracle(seq2seq, prompts, **options)
        assert ours(seq2seq.model, prompts, **options) == expected, options


@pytest.mark.parametrize(
    "case", [f"{name}/{next(iter(cases))}" for name, cases in tiny.CONFIGS.items()]
)
def test_beams_of_a_decoder_equal_transformers(case, get_twins):
    twins = get_twins(case)
    prompts = make_prompts((3, 14, 1, 9))
    options = {"num_beams": 3, "length_penalty": 0.7}
    expected = torch_generate(twins.torch, prompts, side="left", **options)
    assert ours(twins.model, prompts, stop_token_ids=STOP, **options) == expected


def test_options_of_beams_mean_what_they_do_in_transformers(get_twins):
    twins = get_twins("llama/llama3-rope-biases")
    lengths = set()
    for seed, num_beams in ((0, 2), (1, 2), (2, 4)):
        prompts = make_prompts((3, 21, 1, 9), seed)
        for options in (
            {},
            {"early_stopping": True},
            {"length_penalty": -2.0, "early_stopping": "never"},
        ):
            options = options | {"num_beams": num_beams}
            expected = torch_generate(twins.torch, prompts, side="left", **options)
            found = ours(twins.model, prompts, stop_token_ids=STOP, **options)
            assert found == expected, options
            lengths |= set(map(len, found))
    assert len(lengths) > 2


def test_without_stop_tokens_beams_run_to_the_end(get_twins):
    twins = get_twins("llama/llama3-rope-biases")
    prompts = make_prompts((3, 5))
    options = {"num_beams": 4, "length_penalty": 0.5}
    found = ours(twins.model, prompts, stop_token_ids=(), **options)
    assert found == torch_generate(twins.torch, prompts, (), "left", **options)
    assert [len(row) for row in found] == [NEW, NEW]


def test_nothing_is_compiled_twice_and_groups_change_nothing(t5):
    prompts = make_prompts((3, 4, 5, 6))
    together = ours(t5.model, prompts, num_beams=2)
    before = beam.search_jit._cache_size()
    options = {"num_beams": 2, "early_stopping": True, "length_penalty": 0.3}
    ours(t5.model, make_prompts((8, 2, 1, 7)), **options)
    assert beam.search_jit._cache_size() == before
    assert ours(t5.model, prompts, num_beams=2, batch_size=3) == together


def test_a_mesh_changes_nothing(t5):
    prompts = make_prompts((3, 17, 9))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    model = fjft.load_model(str(t5.directory), mesh=mesh)
    alone = ours(t5.model, prompts, num_beams=2)
    assert ours(model, prompts, num_beams=2) == alone


def test_draws_are_forced_too_and_depend_on_the_seed_alone(tmp_path):
    model = make("marian/two-vocabularies", tmp_path).model
    prompts = make_prompts()
    options = {"temperature": 5.0, "stop_token_ids": (), "decoder_start_token_id": 6}
    draws = [ours(model, prompts, **options, seed=seed) for seed in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    for row in draws[0] + draws[1]:
        assert row[-1] == 11
        assert not {PAD, 31} & set(row)
    assert {row[0] for row in ours(model, prompts, forced_bos_token_id=8)} == {8}


def test_text_goes_in_and_comes_out(t5):
    tokenizer = tiny.make_tokenizer()
    texts = ["w7 w9 w12", "w30"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    config = Config(max_new_tokens=NEW, num_beams=4, stop_token_ids=STOP)
    expected = [
        tokenizer.decode([t for t in row if t not in STOP], skip_special_tokens=True)
        for row in generate_tokens(t5.model, prompts, config)
    ]
    found = fjft.generate(
        t5.model, tokenizer, texts, NEW, num_beams=4, stop_token_ids=STOP
    )
    assert found == expected
    plain = ours(t5.model, prompts)
    *_, streamed = stream_tokens(t5.model, prompts, Config(max_new_tokens=NEW))
    assert streamed == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "temperature": 1.0}, r"num_beams=2 .* temperature=1\.0"),
        ({"early_stopping": "maybe"}, "early_stopping='maybe'"),
        ({"forced_bos_token_id": 64}, "forced_bos_token_id=64.* 0 to 63"),
    ],
)
def test_mistakes_are_named(options, message, t5):
    with pytest.raises(UserError, match=message):
        ours(t5.model, [[7]], **options)


def test_what_only_encoder_decoders_have_is_refused_elsewhere(get_twins):
    model = get_twins("llama/llama3-rope-biases").model
    with pytest.raises(UserError, match="forced_bos_token_id is for encoder-decoders"):
        ours(model, [[7]], forced_bos_token_id=8)


def test_positions_of_the_two_texts_are_counted_apart(tmp_path):
    model = make("mbart/pre-norm", tmp_path).model
    (longest,) = make_prompts((40,))
    with pytest.raises(UserError, match=r"41 tokens.* 40 positions"):
        ours(model, [[*longest, 7]])
