"""What virtual tokens promise besides the battery: packing, decoding, families."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_twins
import pytest
import tiny
import tiny_encoders
import tiny_seq2seq
import torch

import fjft
from fjft import tree
from fjft.errors import UserError
from fjft.generation import decode
from fjft.peft import p_tuning, prefix, prompt

N = 3
T = 16
# By the name of our module: that, and the config of `peft`.
METHODS = {
    "prefix": (prefix, peft.PrefixTuningConfig),
    "prompt": (prompt, peft.PromptTuningConfig),
}
FAMILIES = [f"gpt2/{next(iter(tiny.CONFIGS['gpt2']))}"]  # with learned positions
OTHERS = [
    case
    for family, names in tiny.CONFIGS.items()
    if (case := f"{family}/{next(iter(names))}") not in FAMILIES
]
# Its rotation depends on the length of the sequence.
LONGROPE = "phi3/short-longrope"
CASES = [
    pytest.param(name, method, marks=[pytest.mark.slow] if name in OTHERS else [])
    for name in FAMILIES + OTHERS
    for method in METHODS
    if (name, method) != (LONGROPE, "prompt")
]


def make_theirs(twin, method, **options):
    """`peft`'s model, whose virtual tokens start at random."""
    config = METHODS[method][1](num_virtual_tokens=N, **options)
    return peft_twins.make_from(twin, config)


def make_ours(directory, method, **options):
    """Ours, as it starts."""
    module = METHODS[method][0]
    config = module.Config(num_virtual_tokens=N, **options)
    return tiny.build_model(directory, module, config)


@pytest.fixture(scope="module", params=METHODS)
def loaded(request, get_twins, tmp_path_factory):
    """A tiny Llama with virtual tokens, in `peft` and here."""
    twins = get_twins("llama/llama3-rope-biases")
    theirs = make_theirs(twins.torch, request.param, task_type="CAUSAL_LM")
    directory = tmp_path_factory.mktemp("peft")
    theirs.save_pretrained(directory)
    return theirs, peft_twins.load(twins.directory, directory)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_family_gives_the_logits_of_peft(name, method, get_twins, tmp_path):
    twins = get_twins(name)
    theirs = make_theirs(twins.torch, method, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path)
    ours = peft_twins.load(twins.directory, tmp_path)
    ids = tiny.random_ids(2, T)
    expected = tiny.torch_logits(theirs, ids)[:, -T:]
    assert tiny.relative_error(tiny.jit_apply(ours)(ids), expected) < 1e-5


def test_where_rotation_depends_on_the_length_is_no_place_for_a_prompt(get_twins):
    with pytest.raises(UserError, match=r"use peft\.method=prefix or lora"):
        make_ours(get_twins(LONGROPE).directory, "prompt")


def test_packed_equals_unpacked(loaded):
    _, ours = loaded
    apply = tiny.jit_apply(ours)
    batch = tiny.make_batch([[5, 4, 6], [12]], T)
    together = apply(*(batch[k] for k in ("input_ids", "positions", "segment_ids")))
    for number, (row, start, size) in enumerate([(0, 5, 4), (0, 9, 6), (1, 0, 12)]):
        alone = apply(batch["input_ids"][row : row + 1, start : start + size])
        part = together[row : row + 1, start : start + size]
        assert tiny.relative_error(part, alone) < 1e-5, number


def test_greedy_text_is_that_of_peft(loaded):
    # `peft`'s own `generate` loses the prefix with transformers 5: its forward pass is
    # what is asked for each token.
    theirs, ours = loaded
    prompts = [tiny.random_ids(1, size, seed=size) for size in (9, 4)]
    expected = []
    for ids in prompts:
        for _ in range(8):
            best = tiny.torch_logits(theirs, ids)[:, -1:].argmax(-1)
            ids = np.concatenate([ids, best.astype(np.int32)], axis=1)
        expected.append(ids[0, -8:].tolist())
    config = decode.Config(max_new_tokens=8, stop_token_ids=())
    made = decode.generate_tokens(ours, [p[0].tolist() for p in prompts], config)
    assert made == expected


def test_a_text_starts_as_in_peft(get_twins):
    twins = get_twins("llama/llama3-rope-biases")
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w3 w9"}
    theirs = make_theirs(
        twins.torch,
        "prompt",
        task_type="CAUSAL_LM",
        tokenizer_name_or_path=str(twins.directory),
        **options,
    )
    ours = make_ours(twins.directory, "prompt", **options)
    np.testing.assert_array_equal(
        ours.prompt.tokens[...],
        theirs.prompt_encoder["default"].embedding.weight.detach().numpy(),
    )


@pytest.mark.slow
def test_virtual_tokens_before_the_source_of_a_bart(tmp_path):
    case = "bart/post-norm"
    twins = tiny_seq2seq.make_twins(case, tmp_path / "base")
    batch = {
        "input_ids": tiny_seq2seq.random_ids(2, 9),
        "decoder_input_ids": tiny_seq2seq.random_ids(2, 7, seed=1),
    }
    for method in METHODS:
        # Its decoder's heads are not those that `peft` guesses.
        heads = (
            {"num_attention_heads": 2, "num_layers": 3} if method == "prefix" else {}
        )
        theirs = make_theirs(
            twins.torch, method, task_type="SEQ_2_SEQ_LM", token_dim=24, **heads
        )
        theirs.save_pretrained(tmp_path / method)
        ours = peft_twins.load(tmp_path / "base", tmp_path / method)
        expected = tiny_seq2seq.torch_logits(theirs, **batch)
        logits = tiny_seq2seq.jit_apply(ours)(**batch)
        assert tiny.relative_error(logits, expected) < 1e-5, method
        check_cached_decoding(ours, batch)


def check_cached_decoding(model, batch):
    """One token at a time gives what all at once give."""
    graphdef, params = tree.split(model)
    ids = jnp.asarray(batch["decoder_input_ids"])

    @jax.jit
    def decode_all(params):
        model = tree.merge(graphdef, params)
        memory = model.encode(jnp.asarray(batch["input_ids"]))
        cache = model.init_cache(memory, ids.shape[1])
        logits = []
        for t in range(ids.shape[1]):
            here = ids[:, t : t + 1]
            x, cache = model.backbone(
                model.embed(here),
                jnp.full_like(here, t),
                jnp.ones_like(here),
                cache=cache,
            )
            logits.append(model.unembed(x))
        return jnp.concatenate(logits, axis=1)

    expected = tiny_seq2seq.jit_apply(model)(**batch)
    assert tiny.relative_error(decode_all(params), expected) < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        "electra/factorized/token_classification",
        pytest.param(
            "modernbert/biases-mean/sequence_classification", marks=pytest.mark.slow
        ),
        pytest.param("deberta-v2/v2/token_classification", marks=pytest.mark.slow),
        pytest.param("roberta/pad-3/question_answering", marks=pytest.mark.slow),
    ],
)
def test_encoders_give_what_transformers_gives_for_such_vectors(case, tmp_path):
    twin = tiny_encoders.torch_model(case)
    tiny_encoders.save(twin, tmp_path)
    ours = make_ours(tmp_path, "prompt", modules_to_save="")
    ids = tiny_seq2seq.random_ids(2, 9)
    vectors = torch.tensor(np.asarray(ours.prompt.vectors()))
    words = twin.get_input_embeddings()(torch.tensor(ids).long())
    inputs = torch.cat([vectors.expand(2, -1, -1), words], dim=1)
    with torch.no_grad():
        out = twin(inputs_embeds=inputs)
    expected = out.logits if "logits" in out else None
    if expected is None:
        expected = torch.stack([out.start_logits, out.end_logits], -1)
    if expected.ndim == 3:
        expected = expected[:, N:]
    logits = tiny.jit_apply(ours)(ids)
    assert tiny.relative_error(logits, expected.numpy()) < 1e-5


def test_packed_rows_before_an_encoder_are_refused_or_nan(tmp_path):
    case = "bert/tanh-gelu/token_classification"
    tiny_encoders.save(tiny_encoders.torch_model(case), tmp_path)
    ours = make_ours(tmp_path, "prompt")
    ids = jnp.asarray(tiny_seq2seq.random_ids(1, 4))
    segments = jnp.array([[1, 1, 2, 2]], jnp.int32)
    with pytest.raises(UserError, match="packed rows with virtual tokens"):
        ours(ids, None, segments)
    assert np.isnan(tiny.jit_apply(ours)(ids, None, segments)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prompt.Config(num_virtual_tokens=0), "is not positive"),
        (lambda: prompt.Config(prompt_tuning_init="TEXT"), "needs peft.prompt_tuning"),
        (lambda: prompt.Config(prompt_tuning_init="text"), "RANDOM"),
        (
            lambda: p_tuning.Config(encoder_reparameterization_type="LSTM"),
            "LSTM.*use MLP",
        ),
        (
            lambda: prefix.from_peft({"peft_type": "PREFIX_TUNING", "new": 3}),
            "lacks: {'new': 3}",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_models_that_cannot_have_them(get_twins, tmp_path):
    case = "bert/tanh-gelu/masked_lm"
    tiny_encoders.save(tiny_encoders.torch_model(case), tmp_path)
    with pytest.raises(UserError, match="has no decoder to put keys"):
        make_ours(tmp_path, "prefix")
    twins = get_twins("llama/llama3-rope-biases")
    with pytest.raises(UserError, match="the model has 3"):
        make_ours(twins.directory, "prefix", num_layers=2)
    with pytest.raises(UserError, match="save_adapter"):
        fjft.merge_adapter(make_ours(twins.directory, "prompt"))
