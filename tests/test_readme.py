"""The README's tables are what the tables of contents and the tests say.

    python tests/test_readme.py

writes it anew.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fjft.models.families import FAMILIES
from fjft.models.heads import ENCODER_HEADS
from fjft.peft.methods import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

# What a column promises -> the tests of which one must take the family by name.
FAMILY_COLUMNS = {
    "logits": (
        "test_logits_equal_torch",
        "test_outputs_equal_torch_plain_and_padded",
    ),
    "padded, packed": (
        "test_packed_logits_equal_each_segment_alone",
        "test_packed_and_left_padded_rows_equal_each_segment_alone",
        "test_packed_logits_equal_each_pair_alone",
    ),
    "gradients": ("test_loss_and_gradients_equal_torch", "test_gradients_equal_torch"),
    "config fields": (
        "test_a_changed_field_changes_our_logits_as_it_does_torchs",
        "test_a_changed_field_changes_what_torch_changes",
        "test_no_field_of_a_config_is_passed_over",
    ),
    "bit-exact files": (
        "test_what_was_loaded_is_saved_bit_for_bit",
        "test_round_trip_is_bit_exact",
    ),
    "new weights": (
        "test_new_weights_are_drawn_as_transformers_draws_them",
        "test_new_weights_are_as_transformers_makes_them",
    ),
    "greedy": ("test_greedy_tokens_equal_transformers",),
    "beams": (
        "test_beams_equal_transformers",
        "test_beams_of_a_decoder_equal_transformers",
    ),
    "LoRA in peft": (
        "test_adapters_go_to_peft_and_back",
        "test_what_is_written_here_loads_in_peft_with_our_logits",
        "test_an_adapter_goes_to_peft_and_back",
        "test_lora_beside_a_trained_head_round_trips_with_peft",
    ),
}

# The same for methods, whose tests are `test_battery.py`; a part of what a test's name
# says in brackets stands behind a colon.
METHOD_COLUMNS = {
    "decoders": ("test_loss_and_gradients:decoder",),
    "encoders": ("test_loss_and_gradients:encoder",),
    "encoder-decoders": ("test_loss_and_gradients:encoder-decoder",),
    "starts": ("test_it_starts_as_peft_and_as_the_bare_model",),
    "gradients": ("test_loss_and_gradients",),
    "20 steps": ("test_twenty_steps_of_training",),
    "merges": ("test_merged_equals_adapted",),
    "adapter files": ("test_files_go_to_peft_and_back",),
    "whole model": ("test_files_go_to_transformers_and_back",),
    "Orbax": ("test_orbax_gives_back_what_it_was_given",),
    "sharded": ("test_sharded_equals_one_device",),
    "bf16 base": ("test_what_is_trained_is_float32_over_a_bfloat16_base",),
}


@functools.cache
def collected() -> list[str]:
    """The ids of all tests that take families or methods."""
    folders = [f"tests/{name}" for name in ("models", "generation", "peft")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=", "-q"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    found = subprocess.run(
        [*command, *folders], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout.splitlines()


def verified() -> dict[str, set[str]]:
    """The tests, by name, that take each family."""
    tests: dict[str, set[str]] = {name: set() for name in FAMILIES}
    # The longest name first: qwen2_moe-... is not of qwen2.
    names = "|".join(sorted(map(re.escape, FAMILIES), key=len, reverse=True))
    family = re.compile(rf"(?<![\w])({names})(?=[/\]-])")
    for line in collected():
        test, _, parameters = line.partition("[")
        for name in family.findall(parameters):
            tests[name].add(test.rpartition("::")[2])
    return tests


def heads(family: object) -> str:
    """What a family can have on top."""
    known = getattr(family, "HEADS", ("causal_lm",))
    return "encoder heads" if known == ENCODER_HEADS else ", ".join(known)


def families() -> str:
    """The table of families in Markdown."""
    rows = [["`model_type`", "file", "heads", *FAMILY_COLUMNS]]
    for name, tests in verified().items():
        file = FAMILIES[name].__name__.rpartition(".")[2]
        cells = _ticks(tests, FAMILY_COLUMNS)
        rows.append([f"`{name}`", f"`{file}.py`", heads(FAMILIES[name]), *cells])
    return _markdown(rows)


def methods() -> str:
    """The table of methods in Markdown."""
    tests: dict[str, set[str]] = {name: set() for name in METHODS}
    battery = re.compile(r"test_battery\.py::(\w+)\[(\w+)/[^/]*/([\w-]+)\]")
    for test, method, kind in battery.findall("\n".join(collected())):
        tests[method] |= {test, f"{test}:{kind}"}
    rows = [["`peft.method`", "file", "adapter type", *METHOD_COLUMNS]]
    for name, method in METHODS.items():
        file = method.__name__.rpartition(".")[2]
        kind = f"`{method.PEFT_TYPE}`" if method.PEFT_TYPE else ""
        cells = _ticks(tests[name], METHOD_COLUMNS)
        rows.append([f"`{name}`", f"`{file}.py`", kind, *cells])
    return _markdown(rows)


def _ticks(tests: set[str], columns: dict[str, tuple[str, ...]]) -> list[str]:
    return ["✓" if tests & set(need) else "" for need in columns.values()]


def _markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {"families": families, "methods": methods}


def parts(text: str, name: str) -> list[str]:
    """What stands before a table in a text, the table, and what stands behind it."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    table, _, after = rest.partition(end)
    return [before + begin, table, end + after]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_up_to_date(name):
    _, written, _ = parts(README.read_text("utf-8"), name)
    assert written == TABLES[name](), "run: python tests/test_readme.py"


if __name__ == "__main__":
    for name, table in TABLES.items():
        before, _, after = parts(README.read_text("utf-8"), name)
        README.write_text(before + table() + after, "utf-8")
