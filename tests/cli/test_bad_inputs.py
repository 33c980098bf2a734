"""Every mistake gets one sentence with its value and the remedy, and exit code 1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN_ON_FOOD = "package:chatterbot_corpus/data/english/food.yml"


def edit_json(path: Path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


@pytest.fixture
def train(llama, write_config, tmp_path):
    """The arguments of a run on the tiny model, to which mistakes are added."""
    path = write_config(llama, tmp_path, data__train=TRAIN_ON_FOOD)
    return ["train", f"--config={path}"]


# ------------------------------------------------------------------ the config


def test_config_file_that_does_not_exist(fail):
    assert "'configs/nosuch.py'" in fail(["train", "--config=configs/nosuch.py"])


def test_config_file_without_get_config(fail, tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    said = fail(["train", f"--config={tmp_path / 'empty.py'}"])
    assert "get_config" in said
    assert "empty.py" in said


def test_unknown_variant_of_a_config(fail):
    config = Path(__file__).parents[2] / "configs/smollm2_lora_quickstart.py"
    said = fail(["train", f"--config={config}:smok"])
    assert "'smok'" in said
    assert "use smoke" in said


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("train.max_stepz=3", ["'train.max_stepz'", "'train.max_steps'"]),
        ("trian.max_steps=3", ["'trian.max_steps'", "'train.max_steps'"]),
        ("peft.lora_alfa=3", ["'peft.lora_alfa'", "'peft.lora_alpha'"]),
        ("peft.method=lorra", ["'lorra'", "lora"]),
        ("objective.name=clm", ["'clm'", "causal_lm"]),
        ("optimizer.name=adam", ["'adam'", "adamw"]),
        ("train.max_steps=three", ["train.max_steps=three", "a whole number"]),
        ("train.max_steps=1.5", ["train.max_steps=1.5", "a whole number"]),
        ("optimizer.learning_rate=high", ["learning_rate=high", "a number"]),
        ("data.packing=maybe", ["data.packing=maybe", "true or false"]),
        ("data.buckets=1,b", ["data.buckets=b", "a whole number"]),
        ("model.dtype=float8", ["'float8'", "bfloat16"]),
        ("mesh.fsdp=99", ["fsdp=99", "devices"]),
    ],
)
def test_bad_override(train, fail, flag, said):
    message = fail([*train, f"--config.{flag}"])
    assert all(part in message for part in said), message


def test_unknown_section_in_a_config_file(fail, tmp_path):
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    return ml_collections.ConfigDict({'trainer': {'max_steps': 1}})\n"
    )
    said = fail(["train", f"--config={tmp_path / 'c.py'}"])
    assert "'trainer'" in said
    assert "'train'" in said


def test_wrong_type_in_a_config_file(fail, llama, write_config, tmp_path):
    path = Path(write_config(llama, tmp_path))
    path.write_text(path.read_text().replace('"batch_size": 2', '"batch_size": "2"'))
    said = fail(["train", f"--config={path}"])
    assert "train.batch_size='2'" in said
    assert "a whole number" in said


def test_indivisible_batch(train, fail):
    said = fail([*train, "--config.train.batch_size=5", "--config.mesh.fsdp=4"])
    assert "batch 5" in said
    assert "4 or 8" in said


def test_missing_option(fail, tmp_path):
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    return ml_collections.ConfigDict({'model': {'source': 'x'}})\n"
    )
    said = fail(["train", f"--config={tmp_path / 'c.py'}"])
    assert "'train.batch_size' is missing" in said


# ------------------------------------------------------------------- the model


def test_model_that_does_not_exist(train, fail):
    said = fail([*train, "--config.model.source=/no/such/model"])
    assert "/no/such/model" in said


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "nonesuch"])
def test_unknown_model_type(train, fail, broken, model_type):
    edit_json(broken / "config.json", model_type=model_type)
    said = fail([*train, f"--config.model.source={broken}"])
    assert model_type in said


def test_missing_shard(train, fail, llama, broken):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    (broken / "model.safetensors").unlink()
    model.save_pretrained(broken, max_shard_size="100KB")
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    said = fail([*train, f"--config.model.source={broken}"])
    assert shards[1].name in said
    assert "fetch" in said


def test_truncated_safetensors(train, fail, broken):
    path = broken / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    said = fail([*train, f"--config.model.source={broken}"])
    assert "cut short" in said
    assert "fetch it again" in said


def test_tensor_of_wrong_shape(train, fail, broken):
    edit_json(broken / "config.json", intermediate_size=100)
    said = fail([*train, f"--config.model.source={broken}"])
    assert "(96, 64)" in said
    assert "(100, 64)" in said


def test_regex_that_matches_nothing(train, fail):
    said = fail([*train, "--config.peft.target_modules=query|value"])
    assert "'query|value'" in said
    assert "q_proj" in said


def test_adapter_for_another_model(fail, finished, tiny_experiment, tmp_path):
    tiny_experiment.save_tiny_model(tmp_path, "qwen3")
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    adapter = finished / "run" / "adapter"
    edit = shutil.copytree(adapter, tmp_path / "adapter")
    # One layer more than the model has.
    from safetensors.numpy import load_file, save_file

    tensors = load_file(edit / "adapter_model.safetensors")
    extra = {k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}
    save_file(tensors | extra, edit / "adapter_model.safetensors")
    said = fail(
        ["generate", f"--source={tmp_path}", f"--adapter={edit}", "--prompt=Hi"]
    )
    assert "adapter for another model" in said
    assert str(edit) in said


def test_directory_that_is_no_adapter(fail, llama, tmp_path):
    said = fail(
        ["generate", f"--source={llama}", f"--adapter={tmp_path}", "--prompt=Hi"]
    )
    assert "adapter_config.json" in said


# -------------------------------------------------------------------- the data


def with_data(train, path: Path, *rows) -> list[str]:
    path.write_text("".join(f"{row}\n" for row in rows))
    return [*train, f"--config.data.train={path}", "--config.data.eval_size=0"]


def pair(number: int) -> str:
    return json.dumps({"prompt": f"{number} and 1?", "completion": f"{number + 1}"})


def test_empty_dataset(train, fail, tmp_path):
    said = fail(with_data(train, tmp_path / "none.jsonl"))
    assert "none.jsonl" in said
    assert "no rows" in said


def test_data_that_is_not_there(train, fail):
    said = fail([*train, "--config.data.train=/no/such.jsonl"])
    assert "/no/such.jsonl" in said


def test_all_masked_dataset(train, fail, tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    said = fail(with_data(train, tmp_path / "masked.jsonl", row, row))
    assert "none of the 2 rows" in said
    assert "masked.jsonl:1" in said


def test_malformed_line_is_counted_and_the_rest_is_trained(train, call, tmp_path):
    rows = [pair(0), '{"prompt": "cut sho', *(pair(n) for n in range(1, 20))]
    said = call(with_data(train, tmp_path / "data.jsonl", *rows))
    assert said.code == 0, said.err
    assert "21 rows" in said.out
    assert "20 used, 1 not" in said.out
    assert "data.jsonl:2" in said.out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_malformed_line_is_an_error_when_strict(train, fail, tmp_path):
    rows = [pair(0), '{"prompt": "cut sho', pair(1)]
    argv = with_data(train, tmp_path / "data.jsonl", *rows)
    said = fail([*argv, "--config.data.strict=true"])
    assert "data.jsonl:2" in said
    assert "data.strict=False" in said


# -------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for little; skipped where mounting is not permitted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_no_space_for_a_checkpoint(train, fail, call, small_disk):
    run = small_disk / "run"
    argv = [*train, f"--config.checkpoint.directory={run}"]
    many = ["--config.train.max_steps=6", "--config.checkpoint.save_steps=1"]
    said = fail([*argv, *many, "--config.checkpoint.save_total_limit=9"])
    assert "no space left" in said
    assert str(run) in said
    # What was saved before is whole, and readable.
    whole = [path for path in run.glob("checkpoints/*") if path.name.isdigit()]
    assert whole
    last = max(int(path.name) for path in whole)
    shown = call(["evaluate", *argv[1:], f"--step={last}"])
    assert shown.code == 0, shown


def test_no_space_for_a_model(fail, finished, small_disk):
    (small_disk / "filler").write_bytes(bytes(500_000))
    output = small_disk / "model"
    said = fail(
        ["export", f"--run={finished / 'run'}", "--merge", f"--output={output}"]
    )
    assert "no space left" in said
    assert str(output) in said
    assert not list(output.iterdir())


def test_output_that_is_there_is_left_alone(fail, finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = fail(["export", f"--run={finished / 'run'}", f"--output={tmp_path}"])
    assert str(tmp_path) in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_second_run_in_the_same_directory(fail, finished):
    log = finished / "run" / "log.jsonl"
    before = log.read_bytes()
    said = fail(["train", f"--config={finished / 'config.py'}"])
    assert "--resume" in said
    assert log.read_bytes() == before


# ----------------------------------------------------------- runs and commands


def test_run_that_has_not_begun(fail, llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    said = fail(["generate", f"--config={path}", "--prompt=Hi"])
    assert "fjft train" in said


def test_run_that_was_stopped(fail, finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(run / "adapter")
    said = fail(["export", f"--run={run}", f"--output={tmp_path / 'out'}"])
    assert "--step=2" in said
    said = fail(["export", f"--run={run}", "--step=7", f"--output={tmp_path / 'out'}"])
    assert "[1, 2]" in said


def test_directory_that_is_no_run(fail, tmp_path):
    said = fail(["evaluate", f"--run={tmp_path}"])
    assert "no config.json" in said


def test_predictions_that_are_none_of_single_examples(fail, finished, tmp_path):
    flags = [f"--run={finished / 'run'}", f"--predictions={tmp_path / 'x.jsonl'}"]
    said = fail(["evaluate", *flags])
    assert "these have: " in said
    assert "sequence_classification" in said
    assert not (tmp_path / "x.jsonl").exists()


def test_merge_that_is_not_exact_enough(fail, finished, tmp_path):
    said = fail(
        [
            "export",
            f"--run={finished / 'run'}",
            "--merge",
            "--dtype=bfloat16",
            "--tolerance=1e-6",
            f"--output={tmp_path / 'out'}",
        ]
    )
    assert "1e-06" in said
    assert "--dtype=float32" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no command"),
        (["trian"], "unknown command 'trian'; use one of train"),
        (["train"], "--config"),
        (["train", "--config=x.py", "--rezume"], "--rezume"),
        (["train", "--config=x.py", "--config.train.seed", "3"], "seed=VALUE"),
        (["generate", "--config=x.py"], "--prompt"),
        (["generate", "--prompt=Hi"], "--config, --run or --source"),
        (["evaluate"], "--config or --run"),
        (["evaluate", "--config=x.py", "--base", "--step=1"], "exclude each other"),
        (["export", "--config=x.py"], "--output"),
        (["bench", "--config=x.py", "--steps=0"], "--steps"),
    ],
)
def test_wrong_use_of_flags_exits_with_2(call, argv, said):
    found = call(argv)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err


def test_real_process_says_one_line(train):
    """Nothing that libraries print at import stands around the message."""
    command = [sys.executable, "-m", "fjft.cli.main", *train]
    done = subprocess.run(
        [*command, "--config.model.dtype=int3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("fjft: model.dtype='int3' is unknown; use one of")
    assert done.stderr.count("\n") == 1
