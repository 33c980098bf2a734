"""Plans of tiny models: on this machine's CPU devices, and by the TPU's compiler."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

import fjft
from fjft import sharding
from fjft.build import build_experiment
from fjft.checkpoint.source import open_info
from fjft.errors import UserError
from fjft.planning import planner
from fjft.training import fit

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
tiny_experiment = importlib.import_module("tiny_experiment")

SHAPE = tiny_experiment.SHAPE | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A directory with a model's config and nothing else."""
    import transformers

    directory = tmp_path_factory.mktemp("config")
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return str(directory)


def config(llama, **overrides):
    values = {
        "data__max_length": 128,
        "train__batch_size": 8,
        "mesh__fsdp": -1,
        "train__max_steps": 10,
    }
    return tiny_experiment.make_config(llama, "unused", **values | overrides)


@pytest.fixture(scope="module")
def here(llama):
    return fjft.plan(config(llama), target="here")


def test_a_plan_of_this_machine(here):
    assert here.fits
    assert here.limit_bytes is not None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory / 100 < 8 * here.limit_bytes <= memory
    assert here.devices == 8
    assert here.mesh == "fsdp=8"
    assert sum(here.parts.values()) == here.peak_bytes
    assert here.parts["optimizer"] >= 2 * here.parts["trained weights"]
    # On CPUs the compiler's own peak leaves these out.
    assert here.parts["temporaries"] >= here.buffers[0].nbytes > 0
    assert here.collectives["all-gather"][0] > 0
    # Of CPUs no peaks are known, so no speed is made up.
    assert here.step_seconds is None
    assert here.tokens_per_second is None
    assert json.loads(json.dumps(here.to_dict()))["fits"] is True
    assert any("FLOPs a step" in line for line in here.describe())


def test_no_largest_batch_of_unknown_memory(llama):
    found = planner.Planner(config(llama), "here")
    found.target = dataclasses.replace(found.target, memory_bytes=None)
    with pytest.raises(UserError, match="memory of here is not known"):
        found.max_batch()


def test_model_flops_without_remat_are_nearly_all(here):
    """Attention's recomputed scores are what is left above one."""
    assert 1.0 <= here.hardware_flops / here.model_flops < 1.1


def test_a_plan_counts_a_teacher(llama, here):
    options = {"objective__name": "distillation", "objective__teacher": llama}
    report = fjft.plan(config(llama, **options), target="here")
    model = here.parts["frozen weights"]
    # The adapter is no part of it.
    assert 0.9 * model < report.parts["teacher"] <= model
    assert report.parts["frozen weights"] == model
    assert report.model_flops > 1.3 * here.model_flops


def test_a_plan_for_a_chip(llama):
    pytest.importorskip("libtpu")
    found = planner.Planner(config(llama, mesh__fsdp=1), "v5e-1")
    report = found.plan()
    assert report.fits
    assert report.limit_bytes is not None
    assert 0 < report.peak_bytes < report.limit_bytes
    assert report.buffers
    assert report.collectives == {}  # one chip talks to nobody
    assert report.step_seconds is not None
    assert report.step_seconds > 0
    assert report.mfu is not None
    assert 0 < report.mfu < 1
    tokens = 8 * 128
    assert report.tokens_per_second == pytest.approx(tokens / report.step_seconds)
    assert report.total_seconds is not None
    assert report.total_seconds == pytest.approx(10 * report.step_seconds)
    assert report.total_price == pytest.approx(report.total_seconds / 3600 * 1.2)
    # The same again is not compiled again.
    assert found.plan() is report


def test_what_lies_on_the_host_takes_no_room_of_the_chip(llama):
    pytest.importorskip("libtpu")
    found = planner.Planner(config(llama, mesh__fsdp=1, peft__method="full"), "v5e-1")
    there, report = found.plan(), found.plan({"optimizer.offload": True})
    moments = there.parts["optimizer"] - report.parts["optimizer"]
    assert report.host_bytes == moments > 0
    assert there.host_bytes == 0
    assert report.peak_bytes < there.peak_bytes - moments / 2
    assert any("not in it" in line for line in report.describe())


def test_a_plan_for_eight_chips_and_what_is_refused(llama):
    pytest.importorskip("libtpu")
    found = planner.Planner(config(llama), "v5e-8")
    report = found.plan()
    assert report.fits
    assert report.collectives["all-gather"][1] > 0
    huge = found.plan({"train.batch_size": 2**17})
    assert not huge.fits
    assert huge.limit_bytes is not None
    assert huge.peak_bytes > huge.limit_bytes
    assert huge.step_seconds is None or huge.step_seconds > 0
    assert any("does not fit" in line for line in huge.describe())


def test_a_plan_for_gpus(llama):
    pytest.importorskip("jax_cuda12_plugin")
    found = planner.Planner(config(llama), "h100x2")
    report = found.plan()
    assert report.fits
    assert report.buffers
    assert report.step_seconds is not None
    assert report.collectives["all-gather"][0] > 0
    assert any("in the peak" in note for note in report.notes)
    # The compiler of GPUs refuses no program, so the peak is compared.
    huge = found.plan({"train.batch_size": 2**19})
    assert not huge.fits
    assert huge.limit_bytes is not None
    assert huge.peak_bytes > huge.limit_bytes


@pytest.mark.parametrize("limit", [1000, 1040, 1100, 5050, 777777, 123456789])
def test_the_search_for_the_largest_batch(limit):
    """Memory in steps, not quite linear, of which the search must not depend."""
    asked = []

    def peak(n):
        return 1000 + 37 * n + (n // 10) * 3 + (40 if n % 7 == 0 else 0)

    def measure(n):
        asked.append(n)
        return peak(n) <= limit, peak(n)

    found = planner.largest_fitting(measure, 1000, limit)
    assert found == 0 or peak(found) <= limit
    assert peak(found + 1) > limit or peak(found + 2) > limit
    assert len(asked) <= 13


def test_a_run_that_does_not_fit_is_refused(llama, monkeypatch):
    experiment = build_experiment(config(llama))

    mesh, files = sharding.make_mesh(experiment.mesh), open_info(llama)
    fit.check_fits(experiment, mesh, files, 128)  # CPUs do not tell their memory
    monkeypatch.setattr(fit, "_limit", lambda mesh: 1000)
    with pytest.raises(UserError, match=r"needs .* on each device, which has") as e:
        fit.check_fits(experiment, mesh, files, 128)
    assert "temporaries" in str(e.value)
    assert "train.accumulation_steps" in str(e.value)


def test_what_a_refused_program_needed():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (108.21G) exceeds available HBM (15.75G)."
    )
    assert fit.needed_bytes(message) == int(108.21 * 2**30)
    assert fit.needed_bytes("INTERNAL: something else") is None


def test_a_kernel_that_was_refused_is_no_question_of_the_batch():
    message = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in "
        "memory space vmem while allocating on stack for %splash_mha_fwd.6 = f32[8]. "
        "Scoped allocation with size 29.91M and limit 16.00M exceeded scoped vmem limit"
    )
    with pytest.raises(UserError, match=r"29\.91 MiB where 16\.00 are free; lower"):
        fit._check_kernels(message)
    fit._check_kernels("RESOURCE_EXHAUSTED: Ran out of memory on HBM")


@pytest.mark.slow
def test_a_block_of_attention_that_is_too_large_is_named(llama):
    pytest.importorskip("libtpu")
    options = {"data__max_length": 2048, "model__attention_block": 2048}
    with pytest.raises(UserError, match=r"MiB where 16\.00 are free; lower model\.att"):
        fjft.plan(config(llama, **options), target="v5e-8")
