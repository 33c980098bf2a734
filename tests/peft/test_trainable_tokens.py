"""What of trained tokens is not in the battery."""

import functools

import bases
import peft_twins
import pytest
import tiny

import fjft
from fjft.errors import UserError
from fjft.generation import decode
from fjft.peft import trainable_tokens


def test_a_cache_sees_the_trained_vectors(tmp_path):
    base = bases.make_base("qwen2/no-window-tied", tmp_path)
    prompts = [[5, 9, 4], [9, 9, 23, 7]]
    config = trainable_tokens.Config((9, 4, 23))
    ours = tiny.build_model(base.directory, trainable_tokens, config)
    make = functools.partial(
        decode.generate_tokens,
        prompts=prompts,
        config=decode.Config(max_new_tokens=8, stop_token_ids=()),
    )
    before = make(ours)
    peft_twins.scatter(ours)
    made = make(ours)
    assert made != before
    assert made == make(fjft.merge_adapter(ours))


@pytest.mark.parametrize(
    ("case", "token_indices", "message"),
    [
        ("llama/llama3-rope-biases", (), "needs peft.token_indices"),
        ("llama/llama3-rope-biases", (3, 5, 3), "names 3 twice"),
        ("llama/llama3-rope-biases", (3, tiny.VOCAB_SIZE), "has 64.*0 to 63"),
        ("t5/gated-own-head", (3,), "peft.method=select"),
        ("marian/shared", (3,), "peft.method=select"),
    ],
)
def test_what_cannot_be_trained_is_refused(case, token_indices, message, tmp_path):
    base = bases.make_base(case, tmp_path)
    with pytest.raises(UserError, match=message):
        tiny.build_model(
            base.directory,
            trainable_tokens,
            trainable_tokens.Config(token_indices),
        )
