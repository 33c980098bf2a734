"""The larger model that a run learns from: it comes beside the run's own, only read.

Its parameters are among the frozen ones, under paths that begin with `teacher.`, and in
a step it is the model's attribute of that name.
"""

from typing import Any

from flax import nnx
from jax.sharding import Mesh

from fjft import tree
from fjft.blueprint import Blueprint, choose_head, draw_model, most_common_dtype
from fjft.checkpoint.source import ModelInfo, open_info, open_model
from fjft.errors import UserError
from fjft.experiment import Experiment
from fjft.pretrained import build_model

_PREFIX = "teacher."


def has_teacher(e: Experiment) -> bool:
    """Whether the objective takes one."""
    return hasattr(e.objective_module, "TEACHER")


def draw_teacher(e: Experiment, mesh: Mesh) -> Blueprint:
    """Draws the teacher; its weights are not read.

    Raises:
      UserError: There is no such model, or it does not fit the mesh.
    """
    files = open_info(e.objective.teacher)
    return draw_model(
        choose_head(files, e.objective_module.HEAD),
        method=None,
        peft_config=None,
        dtype=_dtype(e, files),
        mesh=mesh,
    )


def load_teacher(e: Experiment, mesh: Mesh, tokenizer: Any) -> Any:
    """Loads the teacher.

    Raises:
      UserError: It cannot be loaded, or its tokenizer is not the model's, `tokenizer`.
    """
    files = open_model(e.objective.teacher)
    _check_vocabulary(e, tokenizer, files.load_tokenizer())
    return build_model(
        files,
        method=None,
        peft_config=None,
        dtype=_dtype(e, files),
        mesh=mesh,
        head=e.objective_module.HEAD,
    )


def _dtype(e: Experiment, files: ModelInfo) -> str:
    return most_common_dtype(files) if e.model.dtype == "auto" else e.model.dtype


def _check_vocabulary(e: Experiment, ours: Any, theirs: Any) -> None:
    """Refuses to compare probabilities of different tokens."""
    known, taught = ours.get_vocab(), theirs.get_vocab()
    if known == taught:
        return
    differing = min(known.items() ^ taught.items(), key=lambda item: item[::-1])[0]
    raise UserError(
        f"the tokenizer of objective.teacher={e.objective.teacher!r} is not the "
        f"model's: the id of {differing!r} is {taught.get(differing)} there and "
        f"{known.get(differing)} here; use a teacher of the same family"
    )


def with_teacher(model: Any, teacher: Any) -> Any:
    """The same model, which brings another along."""
    both = tree.merge(*tree.split(model))
    both.teacher = nnx.data(teacher)
    return both


def as_teachers(params: tree.Params) -> tree.Params:
    """Parameters under the paths that they have as the teacher's."""
    return {f"{_PREFIX}{path}": value for path, value in params.items()}


def is_teachers(path: str) -> bool:
    """Whether a parameter is the teacher's."""
    return path.startswith(_PREFIX)
