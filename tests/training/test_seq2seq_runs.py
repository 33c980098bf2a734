"""Sequence to sequence from rows to a directory that transformers loads."""

import functools
import json

import jax
import numpy as np
import pytest
import tiny
import tiny_seq2seq
import torch
import transformers
from tiny_experiment import assert_cuts_change_nothing, run_config, start

import fjft
from fjft.build import build_experiment
from fjft.cli.main import main


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """The directory of a tiny T5 that never writes w31, and a tokenizer."""
    directory = tmp_path_factory.mktemp("t5")
    tiny_seq2seq.torch_model("t5/relu-tied").save_pretrained(directory)
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(directory)
    path = directory / "generation_config.json"
    never = {"suppress_tokens": [tokenizer.vocab["w31"]]}
    path.write_text(json.dumps(json.loads(path.read_text()) | never))
    return str(directory)


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory):
    """Words that stand for one of four others, or for two."""
    random = np.random.default_rng(0)
    lines = ["# so begins a list", "w9(2) w10"]
    for _ in range(96):
        word = random.integers(10, 14)
        lines.append(f"w{word} w{word + 10}" + f" w{word + 20}" * (word % 2))
    directory = tmp_path_factory.mktemp("dictionary")
    (directory / "train.dict").write_text("\n".join(lines[:-16]))
    (directory / "eval.dict").write_text("\n".join(lines[-16:]))
    return directory


@pytest.fixture
def make_config(t5, dictionary, tmp_path):
    defaults = {
        "model.source": t5,
        "model.from_scratch": False,
        "data.train": str(dictionary / "train.dict"),
        "data.eval": str(dictionary / "eval.dict"),
        "data.eval_size": 0.0,
        "data.max_length": 16,
        "train.batch_size": 16,
        "train.max_steps": 30,
        "train.log_steps": 10,
        "evaluate.eval_steps": 0,
        "evaluate.batch_size": 16,
        "evaluate.max_new_tokens": 16,
        "optimizer.learning_rate": 1e-2,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0.0,
    }
    return functools.partial(run_config, "cmudict_t5.py", tmp_path / "run", defaults)


def test_cuts_and_meshes_do_not_change_the_losses(make_config):
    assert_cuts_change_nothing(make_config(data__packing=True))


def test_a_run_ends_in_what_transformers_loads(make_config, tmp_path, capsys):
    config = make_config()
    result = fjft.train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert [row["step"] for row in log if "eval_exact_match" in row] == [0, 30]

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "run/model"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    _, sets, report = build_experiment(config).load_examples(tokenizer)
    assert report.examples == 80
    held_out = sets[""]
    total, count, exact, texts = 0.0, 0, 0, []
    for i in range(len(held_out.examples)):
        columns = held_out.examples[i].columns
        source, target = (columns[name] for name in ("input_ids", "labels"))
        source = torch.tensor(source[source >= 0])[None].long()
        target = torch.tensor(target[target != -100])[None].long()
        with torch.no_grad():
            total += model(source, labels=target).loss.item() * target.numel()
            written = model.generate(
                source, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id
            )
        count += target.numel()
        exact += written[0, 1:].tolist() == target[0].tolist()
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        texts.append(
            [decode(ids[0].tolist()) for ids in (source, target, written[:, 1:])]
        )
    assert result.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    share = 100 * exact / len(held_out.examples)
    assert result.metrics["eval_exact_match"] == pytest.approx(share)
    # Some words are written with the one that never is.
    assert 50 < share < 100

    told = tmp_path / "told.jsonl"
    flags = [f"--run={tmp_path / 'run'}", f"--predictions={told}"]
    assert main(["evaluate", *flags]) == 0
    assert "eval_exact_match" in capsys.readouterr().out
    lines = [json.loads(line) for line in told.open()]
    names = ("text", "target", "prediction")
    found = {line["row"]: [line[name] for name in names] for line in lines}
    rows = held_out.examples.row_numbers.tolist()
    assert found == dict(zip(rows, texts, strict=True))


def test_spans_taken_out_of_texts_are_judged_as_by_torch(make_config, tmp_path):
    """Packed, on what is drawn for an evaluation."""
    tokenizer = tiny_seq2seq.make_tokenizer(4)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_seq2seq.torch_model("t5/relu-tied").save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    rows = random.integers(0, 40, (48, 12))
    texts = (json.dumps({"text": " ".join(f"w{w}" for w in row)}) for row in rows)
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    config = make_config(
        model__source=str(tmp_path / "model"),
        objective__name="span_corruption",
        data__train=str(tmp_path / "texts.jsonl"),
        data__eval=(),
        data__eval_size=16.0,
        data__text_columns="text",
        data__packing=True,
        data__max_length=24,
        evaluate__predict_with_generate=False,
    )
    _, held_out, _ = build_experiment(config).load_examples(tokenizer)
    [rows] = held_out.values()
    total, count = 0.0, 0
    twin = tiny_seq2seq.torch_model("t5/relu-tied")
    for i in range(len(rows.examples)):
        columns = rows.example(i, (0, 0)).columns
        source, target = (columns[name] for name in ("input_ids", "labels"))
        source = torch.tensor(source[source >= 0])[None].long()
        target = torch.tensor(target[target >= 0])[None].long()
        with torch.no_grad():
            total += twin(source, labels=target).loss.item() * target.numel()
        count += target.numel()
    started = start(config)
    with jax.set_mesh(started.mesh):
        judged = started.run.evaluate(started.state, tokenizer)
    assert judged.metrics["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_merged_adapter_is_in_what_transformers_loads(make_config, tmp_path):
    config = make_config(
        peft__method="lora",
        train__max_steps=2,
        train__log_steps=1,
        evaluate__predict_with_generate=False,
    )
    model = fjft.train(config).model
    run, out = f"--run={tmp_path / 'run'}", tmp_path / "merged"
    assert main(["export", run, f"--output={out}", "--merge"]) == 0
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    ids = tiny.random_ids(2, 12)
    ours = model(jax.numpy.asarray(ids), decoder_input_ids=jax.numpy.asarray(ids))
    with torch.no_grad():
        given = torch.tensor(ids).long()
        theirs = merged(given, decoder_input_ids=given).logits
    assert tiny.max_error(ours, theirs.numpy()) < 1e-4


def test_two_columns_are_to_be_named(make_config):
    with pytest.raises(fjft.UserError, match=r"data\.text_columns is 'source'"):
        fjft.train(make_config(data__text_columns="source"))
