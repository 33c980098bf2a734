"""The commands on a finished run of a tiny model: what they say is true."""

import json

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import PeftModel

import fjft
from fjft.build import build_experiment
from fjft.cli import weights
from fjft.models.attention import Attending, Way

PROMPT = "What is your favourite food?"


@pytest.fixture
def of_run(finished):
    """Flags that mean the finished run."""
    return [f"--config={finished / 'config.py'}"]


def numbers_of(said) -> dict[str, float]:
    """`eval_loss   1.5` lines as a dictionary."""
    rows = [line.split() for line in said.out.splitlines() if "  eval_" in line]
    return {name: float(value) for name, value in rows}


def last_eval(finished) -> list[dict]:
    rows = map(json.loads, (finished / "run/log.jsonl").read_text().splitlines())
    return [row for row in rows if "eval_loss" in row]


def test_evaluate_repeats_the_run_s_own_numbers(call, finished, of_run, tmp_path):
    output = tmp_path / "deep" / "eval.json"
    after = call(["evaluate", *of_run, f"--output={output}"])
    before = call(["evaluate", *of_run, "--base"])
    first, *_, last = last_eval(finished)
    assert numbers_of(after)["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert numbers_of(before)["eval_loss"] == pytest.approx(
        first["eval_loss"], rel=1e-5
    )
    assert first["eval_loss"] != last["eval_loss"]
    written = json.loads(output.read_text())
    assert written["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert written["model"].endswith("run/adapter")


def test_evaluate_a_training_checkpoint(call, of_run):
    last = call(["evaluate", *of_run])
    first, second = (call(["evaluate", *of_run, f"--step={n}"]) for n in (1, 2))
    assert numbers_of(second) == numbers_of(last)
    assert numbers_of(first) != numbers_of(last)


def test_generate_says_what_transformers_says(call, finished, llama):
    """Greedy, streamed and in a batch: the same text as peft on the torch model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(model, finished / "run" / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    new = out[0, ids["input_ids"].shape[1] :]
    wanted = tokenizer.decode(new, skip_special_tokens=True)

    flags = [f"--run={finished / 'run'}", "--max_new_tokens=12"]
    streamed = call(["generate", *flags, f"--prompt={PROMPT}"])
    assert streamed.out == f"{wanted}\n"
    together = call(["generate", *flags, f"--prompt={PROMPT}", "--prompt=Hello"])
    assert together.out.startswith(f"> {PROMPT}\n{wanted}\n\n> Hello\n")


def test_generate_reads_prompts_from_a_file(call, llama, tmp_path):
    (tmp_path / "prompts.txt").write_text("One\n\nTwo\n")
    flags = [f"--source={llama}", "--max_new_tokens=3", "--raw"]
    said = call(["generate", *flags, f"--file={tmp_path / 'prompts.txt'}"])
    assert said.code == 0
    assert said.out.startswith("> One\n")
    assert "\n> Two\n" in said.out


def test_generate_draws_by_seed(call, llama):
    flags = ["generate", f"--source={llama}", "--prompt=Hi", "--temperature=1.5"]
    first, again = (call([*flags, "--seed=1"]).out for _ in range(2))
    assert first == again
    assert first != call([*flags, "--seed=2"]).out


def test_export_writes_the_run_s_adapter(call, finished, of_run, tmp_path):
    """Bit for bit, from the result as from the last checkpoint."""
    own = finished / "run" / "adapter" / "adapter_model.safetensors"
    for name, flags in (("result", []), ("step", ["--step=2"])):
        said = call(["export", *of_run, *flags, f"--output={tmp_path / name}"])
        assert said.code == 0, said
        written = tmp_path / name / "adapter_model.safetensors"
        assert written.read_bytes() == own.read_bytes()


def torch_logits(model) -> np.ndarray:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return model.eval()(ids).logits.float().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model_loads_in_transformers(call, finished, llama, dtype, tmp_path):
    """The merged directory and peft's adapter on the base give the same logits."""
    adapter = finished / "run" / "adapter"
    output = tmp_path / "merged"
    said = call(
        [
            "export",
            f"--source={llama}",
            f"--adapter={adapter}",
            "--merge",
            f"--dtype={dtype}",
            f"--output={output}",
        ]
    )
    assert said.code == 0, said
    assert "differ by at most" in said.out
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    wanted = torch_logits(PeftModel.from_pretrained(base, adapter))
    merged = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == getattr(torch, dtype)
    limit = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    assert np.abs(torch_logits(merged.float()) - wanted).max() < limit
    assert transformers.AutoTokenizer.from_pretrained(output).chat_template


def test_export_after_full_fine_tuning(call, llama, write_config, tmp_path):
    path = write_config(llama, tmp_path, **{"peft.method": "full"})
    assert call(["train", f"--config={path}"]).code == 0
    outputs = [tmp_path / "result", tmp_path / "step"]
    for output, flags in zip(outputs, ([], ["--step=2", "--merge"]), strict=True):
        said = call(["export", f"--config={path}", *flags, f"--output={output}"])
        assert said.code == 0, said
    first, second = ((out / "model.safetensors").read_bytes() for out in outputs)
    assert first == second
    assert first != (llama / "model.safetensors").read_bytes()


def test_resume_of_a_finished_run_leaves_its_numbers(call, finished, of_run):
    first, *_ = last_eval(finished)
    said = call(["train", *of_run, "--config.checkpoint.save_steps=1", "--resume"])
    assert said.code == 0, said
    assert "2 steps are done already" in said.out
    assert last_eval(finished)[0] == first


def test_bench(call, finished, of_run):
    files = sorted((finished / "run").rglob("*"))
    said = call(["bench", *of_run, "--steps=2", "--json"])
    measured = json.loads(said.out)
    assert (measured["rows"], measured["length"]) == (2, 64)
    assert 0 < measured["useful_tokens"] <= 2 * 64
    fastest, slowest = (
        measured["fastest_step_seconds"],
        measured["slowest_step_seconds"],
    )
    assert 0 < fastest <= measured["step_seconds"] <= slowest
    assert measured["useful_tokens_per_second"] <= measured["padded_tokens_per_second"]
    assert measured["compile_seconds"] < measured["first_step_seconds"]
    assert measured["peak_host_bytes"] > measured["weight_bytes"]
    log = (finished / "run" / "log.jsonl").read_text().splitlines()
    logged = next(json.loads(line)["loss"] for line in log if '"loss"' in line)
    assert measured["first_loss"] == pytest.approx(logged, rel=1e-5)
    assert sorted((finished / "run").rglob("*")) == files


def test_bench_on_random_tokens(call, of_run, monkeypatch):
    kept = []
    monkeypatch.setattr("fjft.programs.keep_programs", kept.append)
    said = call(["bench", *of_run, "--steps=1", "--synthetic"])
    assert said.code == 0, said
    assert "100.0% of them useful" in said.out
    assert "the peak is not known" in said.out
    assert kept == ["~/.cache/fjft/programs"]  # for the next start, as in training


@pytest.mark.parametrize("step", [None, 2], ids=["bare", "checkpoint"])
def test_weights_attend_as_their_config_says(llama, finished, step):
    config = fjft.load_config(str(finished / "config.py"), {"model.attention": "xla"})
    experiment = build_experiment(config)
    found = weights.Weights(source=str(llama), step=step, experiment=experiment)
    model = weights.load(found, weights.make_mesh(found))
    ways = {m.way for _, m in nnx.iter_modules(model) if isinstance(m, Attending)}
    assert ways == {Way("xla")}
