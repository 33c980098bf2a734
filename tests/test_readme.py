"""The README's table of families is what the tables of contents and the tests say.

    python tests/test_readme.py

writes it anew.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from fjft.models.families import FAMILIES
from fjft.models.heads import ENCODER_HEADS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"

# What a column promises -> the tests of which one must take the family by name.
COLUMNS = {
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


def collected() -> list[str]:
    """The ids of all tests that take families."""
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


def table() -> str:
    """The table in Markdown."""
    title = ["`model_type`", "file", "heads", *COLUMNS]
    lines = [title, ["---"] * len(title)]
    for name, tests in verified().items():
        file = FAMILIES[name].__name__.rpartition(".")[2]
        cells = ["✓" if tests & set(need) else "" for need in COLUMNS.values()]
        lines.append([f"`{name}`", f"`{file}.py`", heads(FAMILIES[name]), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_table_of_families_is_up_to_date():
    _, _, rest = README.read_text("utf-8").partition(BEGIN)
    written = rest.partition(END)[0]
    assert written == table(), "run: python tests/test_readme.py"


if __name__ == "__main__":
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], "utf-8")
