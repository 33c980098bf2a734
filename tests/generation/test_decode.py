"""Generation against transformers' own, on tiny random models."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from byte_tokenizers import VOCAB_SIZE, byte_level

from fjft import load_model, tree
from fjft.errors import UserError
from fjft.generation import decode, steps
from fjft.generation.decode import Config, generate_tokens, stream_tokens
from fjft.generation.text import encode_prompts, generate, stream
from fjft.sharding import Config as MeshConfig
from fjft.sharding import make_mesh, single_device_mesh

LLAMA = "llama/llama3-rope-biases"
LENGTHS = (3, 21, 1, 9)
FREE = Config(max_new_tokens=30, stop_token_ids=())
GREEDY = steps.Choice(
    seed=np.uint32(0),
    temperature=None,
    top_k=np.int32(0),
    top_p=np.float32(1),
    stop_ids=np.full(8, -1, np.int32),
)


@pytest.fixture
def llama(get_twins) -> tiny.Twins:
    """A Llama for what does not depend on the family."""
    return get_twins(LLAMA)


@pytest.fixture(scope="module")
def byte_model():
    """A model that speaks in bytes."""
    config = tiny.make_config(LLAMA, vocab_size=VOCAB_SIZE, eos_token_id=256)
    return tiny.build_model(tiny.memory_files(tiny.make_torch(config)))


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, tiny.VOCAB_SIZE, length).tolist() for length in lengths]


def torch_generate(model, prompts, max_new_tokens, stop_ids=None) -> list[list[int]]:
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    return out[:, length:].tolist()


def test_greedy_tokens_equal_transformers(twins):
    ours = generate_tokens(twins.model, make_prompts(), FREE)
    assert ours == torch_generate(twins.torch, make_prompts(), 30)


@pytest.mark.parametrize(
    "case", ["gemma3_text/two-bases", "phi3/short-longrope", "qwen2_moe/no-biases"]
)
def test_cached_equals_uncached(case, get_twins):
    twins, prompts = get_twins(case), make_prompts()
    cached = generate_tokens(twins.model, prompts, FREE)
    for prompt, new in zip(prompts, cached, strict=True):
        # The logits of every prefix, from one pass without a cache.
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(prompt) + len(new)] = prompt + new
        likeliest = twins.apply(ids)[0].argmax(axis=-1)
        start = len(prompt) - 1
        assert new == likeliest[start : start + len(new)].tolist()


def test_long_prompts_are_read_in_pieces(get_twins, monkeypatch):
    graphdef, params = tree.split(get_twins("qwen3/alternating-biases").model)
    ids = np.zeros((2, 64), np.int32)
    ids[0], ids[1, 30:] = make_prompts((64, 34))
    segments = (ids > 0).astype(np.int32)
    states = []
    for size in (16, 512):
        monkeypatch.setattr(steps, "PREFILL_TOKENS", size)
        run = functools.partial(steps.prefill, graphdef=graphdef, num_tokens=16)
        states.append(jax.jit(run)(params, ids, segments, GREEDY))
    pieces, whole = states
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    values = [np.array(state.cache.values)[:, :, :64] for state in states]
    real = segments > 0
    assert tiny.max_error(values[0][:, real], values[1][:, real]) < 1e-4


def test_prefill_makes_logits_of_one_position_only(llama):
    graphdef, params = tree.split(llama.model)
    ids = np.ones((3, 32), np.int32)
    run = functools.partial(steps.prefill, graphdef=graphdef, num_tokens=16)
    program = str(jax.make_jaxpr(run)(params, ids, ids, GREEDY))
    assert f"f32[3,1,{tiny.VOCAB_SIZE}]" in program
    assert f"f32[3,32,{tiny.VOCAB_SIZE}]" not in program


def test_any_of_several_stop_tokens_ends_a_row(llama):
    prompts = make_prompts()
    free = generate_tokens(llama.model, prompts, FREE)
    stop_ids = (free[0][4], free[1][7])
    config = Config(max_new_tokens=30, stop_token_ids=stop_ids)
    stopped = generate_tokens(llama.model, prompts, config)
    assert stopped == [cut(row, stop_ids) for row in free]
    assert stopped != free
    oracle = torch_generate(llama.torch, prompts, 30, list(stop_ids))
    assert stopped == [cut(row, stop_ids) for row in oracle]


def cut(row: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """The row up to its first stop token."""
    ends = [i for i, token in enumerate(row) if token in stop_ids]
    return row[: ends[0] + 1] if ends else row


def test_stop_tokens_come_from_the_generation_config(llama, tmp_path):
    free = generate_tokens(llama.model, make_prompts(), FREE)
    tiny.save_torch(llama.torch, tmp_path)
    ids = (free[0][5], free[3][2])
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {[*ids]}}}')
    model = load_model(str(tmp_path))
    config = Config(max_new_tokens=30)
    rows = generate_tokens(model, make_prompts(), config)
    assert rows == [cut(row, (*ids, 2)) for row in free]  # 2 is in config.json


def test_nothing_is_compiled_twice(llama):
    draw = {"temperature": 1.0, "top_k": 5, "stop_token_ids": ()}
    config = Config(max_new_tokens=20, **draw)
    generate_tokens(llama.model, make_prompts((20, 5)), config)

    def compiled():
        return steps.prefill_jit._cache_size(), steps.decode_jit._cache_size()

    before = compiled()
    # The same structure, other files and arrays.
    again = load_model(str(llama.directory))
    draw = {"temperature": 0.7, "top_p": 0.5, "seed": 4, "stop_token_ids": (8, 9)}
    config = Config(max_new_tokens=32, **draw)
    generate_tokens(again, make_prompts((17, 31)), config)
    list(stream_tokens(again, make_prompts((17, 31)), config))
    assert compiled() == before


def lower_decode(model):
    """Decoding one row as a program, and the state that it goes on from."""
    graphdef, params = tree.split(model)
    ids = np.ones((1, 16), np.int32)
    run = functools.partial(steps.prefill, graphdef=graphdef, num_tokens=16)

    def go_on(params, leaves):
        state = jax.tree.unflatten(treedef, leaves)
        until = jnp.int32(16)
        return steps.decode(params, state, GREEDY, until, graphdef=graphdef)

    with jax.set_mesh(single_device_mesh()):
        state = jax.jit(run)(params, ids, ids, GREEDY)
        leaves, treedef = jax.tree.flatten(state)
        return jax.jit(go_on, donate_argnums=1).lower(params, leaves), state


def test_weights_are_neither_constants_nor_results(llama):
    lowered, state = lower_decode(llama.model)
    memory: Any = lowered.compile().memory_analysis()
    assert len(lowered.as_text()) < 200_000
    assert memory.output_size_in_bytes < tree.num_bytes(state) + 1000
    assert memory.alias_size_in_bytes > 0.99 * tree.num_bytes(state.cache)
    assert memory.temp_size_in_bytes < tree.num_bytes(tree.split(llama.model)[1])


def test_bfloat16_is_cut_out_of_stacks_as_it_lies():
    theirs = tiny.make_torch(tiny.make_config(LLAMA))
    model = tiny.build_model(tiny.memory_files(theirs), dtype="bfloat16")
    prompts = make_prompts((9, 9))
    ids = np.array(prompts, np.int32)
    new = np.array(generate_tokens(model, prompts, FREE))
    ids = np.concatenate([ids, new], axis=1)
    exact, rounded = (
        tiny.torch_logits(theirs.to(dtype), ids)[:, 8:-1]
        for dtype in (torch.float32, torch.bfloat16)
    )
    chosen = np.take_along_axis(exact, new[..., None], axis=-1)[..., 0]
    # Nothing but what PyTorch's own rounding may swap comes first.
    assert np.max(exact.max(axis=-1) - chosen) <= 2 * tiny.max_error(rounded, exact)

    program = lower_decode(model)[0].compile().as_text()
    assert program
    assert not re.search(rf"f32\[{model.arch.num_layers},\d+,\d+", program)


def test_groups_give_what_one_batch_gives(llama):
    prompts = make_prompts((3, 21, 1, 9, 5))
    together = generate_tokens(llama.model, prompts, FREE)
    groups = dataclasses.replace(FREE, batch_size=4)  # the second one is one prompt
    assert generate_tokens(llama.model, prompts, groups) == together


def test_draws_depend_on_the_seed_alone(llama):
    def run(seed):
        config = dataclasses.replace(FREE, temperature=1.0, top_p=0.9, seed=seed)
        return generate_tokens(llama.model, make_prompts(), config)

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_a_mesh_changes_nothing(sizes, llama, monkeypatch):
    parts = []

    def spy(*args, **options):
        state = steps.prefill_jit(*args, **options)
        for array in (state.cache.keys, state.tokens):
            parts.append(array.addressable_shards[0].data.shape)
        return state

    monkeypatch.setattr(decode, "prefill_jit", spy)
    model = load_model(str(llama.directory), mesh=make_mesh(MeshConfig(*sizes)))
    prompts = make_prompts((3, 21, 9))
    config = dataclasses.replace(FREE, batch_size=4)
    ours = generate_tokens(model, prompts, config)
    assert ours == torch_generate(llama.torch, prompts, 30)
    rows = 4 // (sizes[0] * sizes[1])
    heads = 1 if sizes[2] == 2 else 2  # 2 heads do not divide by 4
    assert parts == [(3, rows, 64, heads, 10), (4, 32)]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_streamed_pieces_join_to_the_text(temperature, byte_model):
    prompts = ["Hello", "a longer prompt, ü"]
    arguments = (byte_model, byte_level(), prompts, 40, temperature)
    whole = generate(*arguments, seed=5)
    pieces = list(stream(*arguments, seed=5))
    assert len(pieces) > 2
    assert ["".join(row) for row in zip(*pieces, strict=True)] == whole


def test_prompts_are_strings_or_chats_one_or_many():
    tokenizer = byte_level()
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts(tokenizer, chat)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    expected = [*tokenizer("u:Hi")["input_ids"], 256, *tokenizer("a:")["input_ids"]]
    plain = tokenizer("Hi")["input_ids"]
    assert encode_prompts(tokenizer, chat) == [expected]
    assert encode_prompts(tokenizer, [chat, "Hi"]) == [expected, plain]
    assert encode_prompts(tokenizer, "Hi") == [plain]
    assert encode_prompts(tokenizer, []) == []


def test_no_prompts_give_nothing(byte_model):
    assert generate(byte_model, byte_level(), []) == []
    assert list(stream(byte_model, byte_level(), [])) == []


def test_the_last_position_is_used(llama):
    prompts = make_prompts((34,))
    ours = generate_tokens(llama.model, prompts, FREE)
    assert ours == torch_generate(llama.torch, prompts, 30)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3] * 60], {"max_new_tokens": 5}, r"60 tokens.*is 65, .* 64 positions"),
        ([[3], []], {}, "prompt 1 has no tokens"),
        ([[3, 64]], {}, "token 64, but the model knows 0 to 63"),
        ([[3]], {"temperature": -1.0}, r"temperature=-1\.0"),
        ([[3]], {"top_p": 0.0}, r"top_p=0\.0"),
        ([[3]], {"top_k": -1}, "top_k=-1"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_mistakes_are_named(prompts, options, message, llama):
    with pytest.raises(UserError, match=message):
        generate_tokens(
            llama.model, prompts, Config(**({"max_new_tokens": 4} | options))
        )
