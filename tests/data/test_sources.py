import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from fjft.data import sources
from fjft.data.sources import read_rows
from fjft.errors import UserError


def read(path, **kwargs):
    return list(read_rows(str(path), **kwargs))


def summary(rows):
    return [(row.values, row.line, row.error) for row in rows]


def test_jsonl_line_numbers_and_malformed_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "tw\n[1, 2]\n{"text": "\xff"}\n'
        b'{"text": "\xe4\xbd\xa0"}\r\n{"text": "no newline"}'
    )
    assert summary(read(path)) == [
        ({"text": "one"}, 1, None),
        ({}, 3, "not valid JSON"),
        ({}, 4, "not a JSON object"),
        ({}, 5, "not UTF-8"),
        ({"text": "你"}, 6, None),
        ({"text": "no newline"}, 7, None),
    ]
    assert [row.place for row in read(path)][1] == f"{path}:3"


def test_deeply_nested_json_is_an_error_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000 + "\n" + '{"text": "after"}\n')
    assert [row.error for row in read(path)] == ["not valid JSON", None]


def test_json_list_data_and_lines(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list", "data", "lines"):
        assert [r.values for r in read(tmp_path / f"{name}.json")] == rows
    assert [r.line for r in read(tmp_path / "lines.json")] == [1, 2]
    assert read(tmp_path / "list.json")[1].place.endswith("list.json, row 2")


def test_json_cut_short_names_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n{"text": ')
    (row,) = read(path)
    assert (row.line, row.error) == (2, "not valid JSON")


def test_csv_lines_with_newlines_inside_fields(tmp_path):
    path = tmp_path / "a.csv"
    values = [
        {"prompt": "a,b", "completion": "two\nlines"},
        {"prompt": 'quo"te', "completion": "你好"},
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(values)
    path.write_bytes(text.getvalue().encode() + b"short\r\n\r\nx,\xff\r\nlast,row\r\n")
    wrong = "a CSV row with more or fewer fields than the header"
    assert summary(read(path)) == [
        (values[0], 2, None),
        (values[1], 4, None),
        ({}, 5, wrong),
        ({}, 7, "not UTF-8"),
        ({"prompt": "last", "completion": "row"}, 8, None),
    ]


def test_csv_field_longer_than_the_default_limit(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0].values["text"]) == 200_000


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("paragraph", [("one\ntwo", 1), ("three", 6)]),
        ("line", [("one", 1), ("two", 2), ("three", 6)]),
        ("document", [("one\ntwo\n\n \n\nthree", 1)]),
    ],
)
def test_rows_of_a_text(tmp_path, sample_by, expected):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \n\nthree\n")
    rows = list(read_rows(str(path), sample_by=sample_by))
    assert [(row.values["text"], row.line) for row in rows] == expected


def test_parquet(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path)
    assert [row.values for row in found] == rows
    assert found[2999].place == f"{path}, row 3000"


def test_broken_parquet_is_an_error_row(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    (row,) = read(tmp_path / "a.parquet")
    assert "Parquet" in str(row.error)


def test_yaml_scalars_stay_strings_and_lines_are_known(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text(
        "categories:\n- x\nconversations:\n"
        "- - Is it so?\n  - yes\n- - How many?\n  - 42\n- - a\n  - b: c\n"
    )
    assert summary(read(path)) == [
        ({"conversations": ["Is it so?", "yes"]}, 4, None),
        ({"conversations": ["How many?", "42"]}, 6, None),
        ({"conversations": ["a", {"b": "c"}]}, 8, None),
    ]


@pytest.mark.parametrize(
    ("text", "line"), [("conversations: [a\nb: c", 2), ("- a\n", 1), ("", 1)]
)
def test_bad_yaml_is_an_error_row(tmp_path, text, line):
    (tmp_path / "a.yaml").write_text(text)
    (row,) = read(tmp_path / "a.yaml")
    assert row.error
    assert row.line == line


def test_gzip_whole_and_cut_short(tmp_path):
    lines = "".join(json.dumps({"text": str(i) * 20}) + "\n" for i in range(5000))
    packed = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert len(read(tmp_path / "a.jsonl.gz")) == 5000
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    rows = read(tmp_path / "b.jsonl.gz")
    assert "breaks off" in str(rows[-1].error)
    assert all(row.error is None for row in rows[:-1])


def test_directory_glob_and_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("not data")

    def texts(spec):
        return [row.values["text"] for row in read_rows(spec)]

    assert texts(str(tmp_path)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert texts(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    both = (f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl")
    assert texts(both) == texts(",".join(both)) == ["b.jsonl", "a.jsonl"]
    with pytest.raises(UserError, match=r"README\.md has no known format"):
        texts(f"{tmp_path}/*.md")


def test_streams_without_reading_ahead(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 10)
    rows = read_rows((str(path), "./missing.jsonl"))
    assert next(rows).line == 1  # the missing second source has not been touched
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        list(rows)


def test_package_source():
    rows = read("package:chatterbot_corpus/data/english/ai.yml")
    assert rows[0].line == 5
    assert rows[0].values["conversations"][0] == "What is AI?"


@pytest.mark.parametrize(
    "spec", ["./none.jsonl", "/none/here", "data/*.jsonl", "none.csv", "~/nope.txt"]
)
def test_missing_files_are_user_errors(spec):
    with pytest.raises(UserError, match="matches no file"):
        list(read_rows(spec))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", ("org/name", None, "train", None)),
        ("org/name:validation", ("org/name", None, "validation", None)),
        ("org/name:main:test", ("org/name", "main", "test", None)),
        ("org/name:main:test[:2]", ("org/name", "main", "test", 2)),
        ("org/name:train[:3]", ("org/name", None, "train", 3)),
    ],
)
def test_hub_specs(monkeypatch, spec, expected):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows(spec))
    *call, take = expected
    assert asked == [tuple(call)]
    assert [r.values["text"] for r in rows] == list("01234")[:take]
    assert rows[1].place == f"{spec}, row 2"


def test_default_split_can_differ(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sources, "read_hub", lambda spec, split: seen.append(split) or ()
    )
    list(read_rows("org/name", split="test"))
    assert seen == ["test"]


def test_hub_failure_is_a_user_error():
    with pytest.raises(UserError, match="'org/none' is no local file"):
        list(read_rows("org/none"))
    with pytest.raises(UserError, match="id:config:split"):
        list(read_rows("org/none:a:b:c"))
