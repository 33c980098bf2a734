"""What the command line says of itself, and of errors that are not the user's."""

import errno
import os
import subprocess
import sys
from typing import Any

import pytest

from fjft import build
from fjft.cli import flags, main
from fjft.errors import UserError


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help_with_an_example(call, command):
    said = call([command, "--help"])
    assert said.code == 0
    assert f"fjft {command} " in said.out.split("example:")[1]


def test_help_lists_every_command(call):
    said = call(["--help"])
    assert said.code == 0
    assert all(f"\n  {command} " in said.out for command in main.COMMANDS)


def test_version(call):
    assert call(["--version"]).out == "fjft 0.1.0\n"


@pytest.mark.parametrize(
    ("variable", "given", "taken"),
    [
        ("XLA_CLIENT_MEM_FRACTION", None, "0.9"),
        ("XLA_CLIENT_MEM_FRACTION", "0.5", "0.5"),
        # JAX refuses to be told twice.
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5", None),
    ],
)
def test_more_of_a_gpu_is_taken_unless_told_otherwise(
    call, monkeypatch, variable, given, taken
):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(variable, given)
    call(["plan", "--help"])
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == taken


def test_bug_keeps_its_trace(monkeypatch):
    def break_down(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("fjft.cli.train.run", break_down)
    with pytest.raises(ZeroDivisionError):
        main.main(["train"])


def test_debug_shows_the_trace_of_a_users_mistake():
    with pytest.raises(UserError):
        main.main(["train", "--config=nosuch.py", "--debug"])


def test_interruption_is_quiet(monkeypatch, call):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fjft.cli.train.run", interrupt)
    assert call(["train"]) == (130, "", "fjft: interrupted\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "no space left"),
        (MemoryError(), "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory on HBM"), "train.batch_size"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b"),
    ],
)
def test_errors_of_the_machine_are_explained(error, said):
    explained = main.explain(error)
    assert explained is not None
    assert said in explained
    assert "\n" not in explained


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.max_steps", "7", 7),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.warmup_steps", "5", 5.0),
        ("data.packing", "False", False),
        ("data.packing", "1", True),
        ("data.buckets", "128,256", (128, 256)),
        ("data.buckets", "(64, )", (64,)),
        ("data.buckets", "", ()),
        ("data.train", "a.jsonl,b.jsonl", "a.jsonl,b.jsonl"),
        ("peft.target_modules", "q_proj|layers\\.1\\..*", "q_proj|layers\\.1\\..*"),
        ("peft.rank_pattern.q_proj", "4", 4),
        ("peft.rank_pattern.layers\\.1\\..*", "2", 2),
        ("model.sizes.num_hidden_layers", "2", 2),
        ("model.sizes.attention_dropout", "0.1", 0.1),
        ("checkpoint.resume", "true", True),
        ("model.source", "a=b", "a=b"),
    ],
)
def test_overrides_take_the_type_of_their_option(
    llama, write_config, tmp_path, key, text, value
):
    path = write_config(llama, tmp_path)
    parser = flags.make_parser("train", "", "")
    flags.add_config(parser)
    chosen = flags.parse(parser, [f"--config={path}", f"--config.{key}={text}"])
    config = flags.load_config(chosen)
    if key.startswith("model.sizes"):  # of a model that has no weights yet
        build.override(config, {"model.from_scratch": True, "peft.method": "full"})
    section, option, *entry = key.split(".", 2)
    found: Any = config.to_dict()[section][option]
    found = found[entry[0]] if entry else found
    assert found == value
    assert type(found) is type(value)
    build.build_experiment(config)


def test_new_method_drops_the_options_of_the_old_one(llama, write_config, tmp_path):
    config = build.load_config(write_config(llama, tmp_path), {"peft.method": "full"})
    assert config.to_dict()["peft"] == {"method": "full"}
    build.build_experiment(config)


def test_options_that_the_file_leaves_out_can_be_set(llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    values = {"evaluate.batch_size": 4, "objective.label_smoothing": 0.1}
    experiment = build.build_experiment(build.load_config(path, values))
    assert experiment.evaluate.batch_size == 4
    assert experiment.objective.label_smoothing == 0.1


def test_values_from_python_are_checked(llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    with pytest.raises(UserError, match=r"train.max_steps='3'.*a whole number"):
        build.load_config(path, {"train.max_steps": "3"})


def test_a_model_from_random_weights_needs_no_torch(tmp_path):
    flags = f"--config.checkpoint.directory={tmp_path}"
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from fjft.cli.main import main\n"
        f"sys.exit(main(['train', '--config=configs/cmudict_t5.py:smoke', {flags!r}]))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_transformers_comes_without_torch_which_may_come_later():
    program = (
        "import sys\n"
        "from fjft.cli import main\n"
        "main._leave_out_torch()\n"
        "import transformers\n"
        "assert 'torch' not in sys.modules\n"
        "assert not transformers.is_torch_available()\n"
        "import torch\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (None, ["None", "glibc.malloc.hugetlb=1"]),
        ("glibc.malloc.check=0", ["glibc.malloc.check=0"]),
    ],
)
def test_a_process_starts_anew_once_to_take_large_pages(given, seen):
    program = (
        "import os, sys\n"
        "print(os.environ.get('GLIBC_TUNABLES'), os.getpid(), flush=True)\n"
        "from fjft.cli.main import main\n"
        "sys.argv = ['fjft', 'plan', '--help']\n"
        "main()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | ({} if given is None else {"GLIBC_TUNABLES": given}),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    starts, usage = out.split("usage:")
    tunables, processes = zip(*map(str.split, starts.splitlines()), strict=True)
    assert list(tunables) == seen
    assert len(set(processes)) == 1
    assert "fjft plan" in usage
