import numpy as np
import pytest

from fjft.data import seq2seq
from fjft.data.config import Config
from fjft.data.dataset import load_examples
from fjft.data.examples import Example, Spool
from fjft.errors import UserError
from fjft.labels import IGNORED


def pair(i, n=1):
    return {"prompt": f"Say {i}:", "completion": f" {i}" * n}


def test_every_bad_row_is_counted_with_its_place(chatml, write):
    path = write(
        pair(1),
        '{"prompt": "a"',
        {"question": "?"},
        {"prompt": "a", "completion": 3},
        {"messages": [{"role": "user", "content": "Hi"}]},
        pair(2, n=500),
        {"messages": [{"role": "alien", "content": "Hi"}]},
        {"conversations": ["Hi", "Hello"]},
    )
    train, evaluation, report = load_examples(Config(train=path, max_length=64), chatml)
    assert len(train.examples) == report.examples == 2
    assert not evaluation
    assert report.rows_read == 8
    places = {r.places[0].split(" ")[0] for r in report.rejected.values()}
    assert places == {f"{path}:{n}" for n in (2, 3, 4, 5, 6, 7)}
    assert report.rejected_rows == 6
    assert report.rejected["not valid JSON"].count == 1
    assert report.formats == {"prompt/completion": 2, "messages": 1, "turns": 1}
    text = "\n".join(report.describe())
    assert f"1 not valid JSON: {path}:2" in text
    assert "messages (1)" in text
    assert report.tokens == train.examples.lengths.sum()
    assert report.supervised_tokens == train.examples.supervised.sum()
    assert report.longest == train.examples.lengths.max()
    assert any("6 of 8 rows" in warning for warning in report.warnings())


def test_only_the_first_places_are_kept(chatml, write):
    path = write(*["{"] * 20, pair(1))
    report = load_examples(Config(train=path), chatml)[2]
    rejections = report.rejected["not valid JSON"]
    assert rejections.count == 20
    assert rejections.places == [f"{path}:{n}" for n in range(1, 6)]
    assert "and 15 more" in "\n".join(report.describe())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not valid JSON"),
        ({"question": "?"}, "no known format"),
        (pair(1, n=500), "longer than max_length"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "nothing to learn"),
    ],
)
def test_strict_stops_at_the_first_bad_row(chatml, write, bad, reason):
    path = write(pair(1), bad, "{")
    with pytest.raises(UserError, match=reason) as caught:
        load_examples(Config(train=path, max_length=64, strict=True), chatml)
    assert f"{path}:2" in str(caught.value)


def test_empty_and_all_masked_data_are_errors(chatml, write):
    with pytest.raises(UserError, match=r"data\.train is empty"):
        load_examples(Config(), chatml)
    with pytest.raises(UserError, match="holds no rows"):
        load_examples(Config(train=write()), chatml)
    path = write(*[{"messages": [{"role": "user", "content": "Hi"}]}] * 3)
    with pytest.raises(UserError, match=r"none of the 3 rows .* nothing to learn") as e:
        load_examples(Config(train=path), chatml)
    assert f"{path}:1" in str(e.value)


def test_separate_evaluation_data(chatml, write):
    train_path = write(*[pair(i) for i in range(20)])
    eval_path = write(*[pair(i) for i in range(5)], "{", name="eval.jsonl")
    config = Config(train=train_path, eval=eval_path)
    train, sets, report = load_examples(config, chatml)
    assert (len(train.examples), len(sets[""].examples)) == (20, 5)
    assert report.evals[0].rejected_rows == 1
    assert "data.eval: 6 rows" in "\n".join(report.describe())


def test_several_sets_of_evaluation_data(chatml, write):
    path = write(*[pair(i) for i in range(20)])
    few = write(*[pair(i) for i in range(5)], "{", name="few.jsonl")
    config = Config(train=path, eval={"seen": path, "few": few})
    _, sets, report = load_examples(config, chatml)
    found = {name: len(rows.examples) for name, rows in sets.items()}
    assert found == {"seen": 20, "few": 5}
    told = "\n".join(report.describe())
    assert "data.eval.seen: 20 rows" in told
    assert "data.eval.few: 6 rows" in told
    with pytest.raises(UserError, match=r"data\.eval\.none: .* holds no rows"):
        load_examples(Config(train=path, eval={"none": ""}), chatml)


def first_tokens(rows):
    return {
        rows.examples[i].columns["input_ids"].tobytes()
        for i in range(len(rows.examples))
    }


def test_held_out_rows_depend_on_seed_and_row_alone(chatml, write):
    path = write(*[pair(i, n=1 + (i == 7) * 300) for i in range(200)])

    def split(seed=0, **config):
        train, sets, report = load_examples(Config(train=path, **config), chatml, seed)
        held_out = sets[""]
        assert report.held_out == len(held_out.examples)
        assert len(train.examples) + len(held_out.examples) == report.examples
        assert not first_tokens(train) & first_tokens(held_out)
        return first_tokens(held_out)

    by_count = split(eval_size=20)
    assert len(by_count) == 20
    assert split(eval_size=20) == by_count
    assert split(eval_size=20, seed=1) != by_count
    # The one long row is dropped, which moves at most itself.
    assert len(split(eval_size=20, max_length=64) ^ by_count) <= 2
    assert 20 < len(split(eval_size=0.2)) < 60


def test_what_is_held_out_is_not_learned_from_its_repetition(chatml, write):
    path = write(*[pair(i % 20) for i in range(60)])
    config = Config(train=path, eval_size=5)
    train, sets, report = load_examples(config, chatml)
    held_out = first_tokens(sets[""])
    assert len(first_tokens(train)) == 20 - len(held_out)
    assert not first_tokens(train) & held_out
    assert report.also_held_out == 60 - 5 - len(train.examples)
    assert f"  {report.also_held_out} equal to these" in "\n".join(report.describe())


def test_only_repetitions_of_what_is_held_out_are_no_data(chatml, write):
    path = write(*[pair(0) for _ in range(9)])
    with pytest.raises(UserError, match=r"set data\.eval to a source of its own"):
        load_examples(Config(train=path, eval_size=2), chatml)


@pytest.mark.parametrize("size", [3, 50, 1e-9])
def test_holding_out_all_or_nothing_is_an_error(chatml, write, size):
    path = write(*[pair(i) for i in range(3)])
    with pytest.raises(UserError, match="from 1 to 2"):
        load_examples(Config(train=path, eval_size=size), chatml)


def test_warns_when_no_end_is_learned(chatml, write):
    chatml.eos_token = None
    report = load_examples(Config(train=write(pair(1))), chatml)[2]
    assert any("not learn to stop" in warning for warning in report.warnings())
    chat = write({"conversations": ["Hi", "Hello"]})
    report = load_examples(Config(train=chat), chatml)[2]
    assert report.warnings() == []
    assert list(report.end_tokens) == [chatml.convert_tokens_to_ids("<|im_end|>")]


def test_truncated_rows_are_counted(chatml, write):
    path = write(pair(1), pair(2, n=500))
    config = Config(train=path, max_length=64, truncation="truncate")
    train, _, report = load_examples(config, chatml)
    assert report.truncated == 1
    assert report.longest == 64
    assert "1 cut to max_length" in "\n".join(report.describe())
    assert len(train.examples) == 2


def test_long_texts_can_be_split_so_that_nothing_is_lost(chatml, write):
    text = " ".join(f"word{i}" for i in range(50))
    path = write({"text": text}, {"text": "short"}, pair(2, n=500))
    config = Config(train=path, max_length=64, truncation="split", packing=False)
    train, _, report = load_examples(config, chatml)
    pieces = [train.examples[i] for i in range(len(train.examples) - 1)]
    assert report.rejected_rows == 1  # A pair stays whole.
    assert [piece.columns["input_ids"].size for piece in pieces[:-1]] == [64] * (
        len(pieces) - 1
    )
    ids = np.concatenate([piece.columns["input_ids"] for piece in pieces])
    assert ids.tolist() == [*chatml(text)["input_ids"], chatml.eos_token_id]
    for piece in pieces:
        labels = piece.columns["labels"]
        assert labels[0] == IGNORED
        np.testing.assert_array_equal(labels[1:], piece.columns["input_ids"][1:])
    assert report.end_tokens == {chatml.eos_token_id: 2}


def test_what_cannot_be_split_is_not_cut(chatml, write):
    rows = [{"source": "a", "target": "b " * size} for size in (1, 100)]
    options = {"text_columns": "source,target", "max_length": 64, "packing": False}
    config = Config(train=write(*rows), truncation="split", **options)
    _, _, report = load_examples(config, chatml, make_encoder=seq2seq.Encoder)
    assert (report.examples, report.rejected_rows, report.truncated) == (1, 1, 0)


def test_chat_template_from_a_file(tokenizer, template, write, tmp_path):
    path = write({"conversations": ["Hi", "Hello"]})
    (tmp_path / "chat.jinja").write_text(template)
    config = Config(train=path, chat_template=str(tmp_path / "chat.jinja"))
    load_examples(config, tokenizer)
    assert tokenizer.chat_template == template
    with pytest.raises(UserError, match=r"none\.jinja"):
        load_examples(Config(train=path, chat_template="none.jinja"), tokenizer)


def test_chats_beyond_one_chunk_keep_their_order(chatml, write):
    path = write(*[pair(i) for i in range(2500)])
    train, _, _ = load_examples(Config(train=path), chatml)
    texts = [
        chatml.decode(train.examples[i].columns["input_ids"], skip_special_tokens=True)
        for i in (0, 1023, 1024, 2499)
    ]
    assert texts == [f"Say {i}: {i}" for i in (0, 1023, 1024, 2499)]
    assert train.examples.row_numbers[2499] == 2499


def test_spool_leaves_nothing_behind(tmp_path):
    spool = Spool(tmp_path)
    ids = np.array([1, 2, 3], np.int32)
    labels = np.array([IGNORED, 2, 3], np.int32)
    spool.add([Example({"input_ids": ids, "labels": labels})], [7])
    examples = spool.finish()
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(examples[0].columns["input_ids"], ids)
    assert (examples.supervised[0], examples.row_numbers[0]) == (2, 7)
    unfinished = Spool(tmp_path)
    del unfinished
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device")])
def test_full_disk_is_a_user_error(tmp_path, monkeypatch, error):
    spool = Spool(tmp_path)

    class FullFile:
        def __enter__(self):
            raise error

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(type(tmp_path), "open", lambda *_: FullFile())
    ones = np.ones(2, np.int32)
    with pytest.raises(UserError, match="TMPDIR"):
        spool.add([Example({"input_ids": ones, "labels": ones})], [0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_on", "user"),
        ("truncation", "cut"),
        ("sample_by", "word"),
        ("max_length", 1),
        ("eval_size", -1),
        ("eval_size", 2.5),
        ("buckets", (64, 32)),
        ("buckets", (0, 32)),
    ],
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(UserError, match=rf"data\.{field} is"):
        Config(**{field: value})


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_real_conversations(chatml, language):
    config = Config(
        train=f"package:chatterbot_corpus/data/{language}/*.yml",
        max_length=4096,
        eval_size=0.1,
    )
    train, sets, report = load_examples(config, chatml)
    assert report.formats.most_common(1)[0][0] == "turns"
    assert report.rejected_rows <= 2
    assert report.efficiency > 0.9
    for rows in (train, sets[""]):
        for i in range(0, len(rows.examples), 37):
            ids, labels = rows.examples[i].columns.values()
            # Between the header and the end of each turn, exactly the answers.
            text = chatml.decode(ids)
            answers = [
                part.split("<|im_end|>")[0] for part in text.split("assistant\n")
            ]
            is_learned = chatml.decode(labels[labels != IGNORED])
            assert is_learned == "".join(a + "<|im_end|>" for a in answers[1:])
