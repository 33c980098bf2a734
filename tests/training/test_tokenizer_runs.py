"""Runs that train their own tokenizer: once, and it goes wherever the model goes."""

import functools
import json

import pytest
import tiny_encoders
import tiny_seq2seq
import transformers
from tiny_experiment import TEXT, make_config, start

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main
from fjft.data.config import Config
from fjft.data.vocabulary import read_texts
from fjft.training.tokenizer import ensure_tokenizer

CHINESE = "package:chatterbot_corpus/data/chinese/*.yml"
SAID = "What is 人工智能?"


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Small talk in two languages, a text each."""
    lines = [
        json.dumps({"text": text}) for text in read_texts(Config(train=(TEXT, CHINESE)))
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(lines[::2]))
    return str(path)


@pytest.fixture
def config(tmp_path, llama, texts):
    """A tiny model of a family, without its weights and its tokenizer."""
    sources = {
        "llama": transformers.AutoConfig.from_pretrained(llama),
        "bert": tiny_encoders.make_config("bert/tanh-gelu/masked_lm"),
        "t5": tiny_seq2seq.make_config(
            "t5/relu-tied", pad_token_id=3, decoder_start_token_id=3
        ),
    }

    def make(family, **overrides):
        sources[family].save_pretrained(tmp_path / family)
        return make_config(
            str(tmp_path / family),
            tmp_path / "run",
            model__from_scratch=True,
            peft__method="full",
            data__train=texts,
            data__max_length=40,
            optimizer__warmup_steps=0.0,
            **{"train__max_steps": 2} | overrides,
        )

    return make


def tokens(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)(SAID).input_ids


@pytest.mark.parametrize(
    ("family", "kind", "size", "objective", "auto"),
    [
        ("bert", "wordpiece", 2000, "masked_lm", "MaskedLM"),
        ("t5", "unigram", 3000, "span_corruption", "Seq2SeqLM"),
    ],
)
def test_it_is_saved_with_the_model(
    config, tmp_path, family, kind, size, objective, auto
):
    made = config(
        family,
        model__tokenizer=kind,
        model__sizes={"vocab_size": size},
        objective__name=objective,
    )
    said = ensure_tokenizer(build_experiment(made))
    started = start(made)
    fjft.save_model(started.run.model(started.state), tmp_path / "model")
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(
        tmp_path / "model"
    )
    assert model.get_input_embeddings().num_embeddings == size
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert f"a {kind} tokenizer of {len(tokenizer):,} tokens" in said
    assert len(tokenizer) <= size
    for name in ("pad", "bos", "eos"):
        id = getattr(tokenizer, f"{name}_token_id")
        assert getattr(model.config, f"{name}_token_id", id) == id
    if family == "t5":
        assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    assert tokenizer(SAID).input_ids == tokens(tmp_path / "run/tokenizer")


def test_a_run_that_goes_on_keeps_it(config, tmp_path, capsys):
    make = functools.partial(
        config, "llama", model__tokenizer="bpe", checkpoint__save_steps=2
    )
    fjft.train(make())
    file = tmp_path / "run/tokenizer/tokenizer.json"
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    result = fjft.train(make(checkpoint__resume=True, train__max_steps=4))
    assert "of 384 tokens, trained before" in capsys.readouterr().out
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (first, written)
    assert result.tokenizer(SAID).input_ids == tokens(tmp_path / "run/tokenizer")
    run = f"--run={tmp_path / 'run'}"
    assert main(["evaluate", run, "--step=4"]) == 0
    assert f"{result.metrics['eval_loss']:.6g}" in capsys.readouterr().out
    assert main(["generate", run, f"--prompt={SAID}", "--max_new_tokens=1"]) == 0
    config_json = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config_json["eos_token_id"] == result.tokenizer.eos_token_id


def test_what_has_no_tokenizer_yet_says_so(config):
    made = config("llama", model__tokenizer="bpe")
    with pytest.raises(fjft.UserError, match=r"tokenizer=bpe asks for; run fjft train"):
        build_experiment(made).open_model()
    with pytest.raises(fjft.UserError, match=r"holds no tokenizer.*model\.tokenizer"):
        fjft.train(config("llama"))
    with pytest.raises(fjft.UserError, match=r"model\.tokenizer='word'"):
        build_experiment(config("llama", model__tokenizer="word"))
    with pytest.raises(fjft.UserError, match=r"model\.from_scratch=True"):
        build_experiment(make_config("x", "y", model__tokenizer="bpe"))
