"""The floor plan holds: imports go down, and each thing is done in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fjft

ROOT = Path(fjft.__file__).parent
FLOORS = {
    1: "errors labels options sources tree sharding distributed telemetry "
    "telemetry_plot telemetry_speed programs models objectives optimize",
    2: "data peft checkpoint generation evaluate",
    3: "blueprint experiment",
    4: "adapters build pretrained",
    5: "training",
    6: "planning search",
    7: "cli",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
# Neighbours on one floor that may be asked: they know of no model and no data.
FOUNDATIONS = {
    "errors",
    "labels",
    "options",
    "sources",
    "tree",
    "sharding",
    "distributed",
    "optimize",
}
# Rooms that never look into one another, though a floor may lie between them.
SEPARATE = {
    "models": {"peft", "objectives", "data"},
    "objectives": {"models", "peft", "data"},
    "data": {"models", "peft", "objectives"},
    "peft": {"objectives", "data"},
}
SPEAKERS = {
    "telemetry.py",
    "telemetry_plot.py",
    "telemetry_speed.py",
    "training/loop.py",
}
FILES = sorted(ROOT.rglob("*.py"))


def _room(name: str) -> str:
    return name.split(".")[1]


def _imports(tree: ast.AST) -> set[str]:
    """Every module that a file imports, `from fjft import x` being `fjft.x`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f".{a.name}" for a in node.names] if module == "fjft" else [""]
            found |= {module + name for name in names}
    return found


@pytest.fixture(params=FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def file(request):
    path = request.param
    return path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def test_imports_go_down_and_never_sideways(file):
    name, tree = file
    room = name.partition("/")[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} stands on no floor: give it one in this test"
    for module in filter(lambda m: m.startswith("fjft."), _imports(tree)):
        other = _room(module)
        if other == room:
            continue
        together = other in FOUNDATIONS or room.startswith("telemetry")
        beside = FLOOR[other] == FLOOR[room] and together
        assert FLOOR[other] < FLOOR[room] or beside, f"{name} imports {module}"
        assert other not in SEPARATE.get(room, ()), f"{name} imports {module}"


def test_torch_is_never_needed(file):
    name, tree = file
    for module in _imports(tree):
        assert module.partition(".")[0] not in {"torch", "peft", "trl"}, name
        assert "modeling" not in module, name


def test_only_the_command_line_touches_flags(file):
    name, tree = file
    flags = {
        "argparse",
        "absl",
        "absl.flags",
        "absl.app",
        "ml_collections.config_flags",
    }
    assert name.startswith("cli/") or not _imports(tree) & flags


def test_only_the_loop_telemetry_and_the_command_line_speak(file):
    name, tree = file
    if name in SPEAKERS or name.startswith("cli/"):
        return
    calls = (n.func for n in ast.walk(tree) if isinstance(n, ast.Call))
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"]
    assert not _imports(tree) & {"logging", "absl.logging", "rich"}


def test_no_room_is_a_lumber_room(file):
    name, tree = file
    lumber = {"utils", "helpers", "common", "misc", "manager", "registry"}
    assert not lumber & set(name.removesuffix(".py").split("/"))
    assert ast.get_docstring(tree) or not tree.body


def test_importing_the_package_is_light():
    heavy = ("jax", "flax", "transformers", "torch", "numpy")
    code = f"import sys, fjft; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    for name in fjft.__all__:
        assert callable(getattr(fjft, name)), name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fjft.nothing_of_the_kind  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
