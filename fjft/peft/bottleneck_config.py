"""Options of bottleneck adapters, and what of AdapterHub's files they stand for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fjft.errors import UserError
from fjft.models.layers import ACTIVATIONS
from fjft.options import check_name


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a paper's adapters are.

    Attributes:
      places: The sublayers that have one, by the names of AdapterHub's options.
      reads: What it reads: the sublayer's `output`; the `sum` of that and the residual
        stream, normed where the layer norms that; or the `residual` stream alone.
      non_linearity: Of the bottleneck.
      reduction_factor: The layer's width over the bottleneck's.
      scaling: What its output is multiplied by.
      starts_at_zero: Whether it adds nothing at the start, or next to nothing.
    """

    places: tuple[str, ...]
    reads: str
    non_linearity: str
    reduction_factor: float
    scaling: float
    starts_at_zero: bool


KINDS = {
    "houlsby": Kind(("mh_adapter", "output_adapter"), "output", "swish", 16, 1, False),
    "pfeiffer": Kind(("output_adapter",), "sum", "relu", 16, 1, False),
    "parallel": Kind(("output_adapter",), "residual", "relu", 2, 4, True),
}
# AdapterHub's names of places -> the sublayers, as blocks name them.
SUBLAYERS = {"mh_adapter": "attention", "output_adapter": "mlp"}
# AdapterHub's options that are here as in the papers, and nowhere otherwise.
FIXED = {
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
    "leave_out": [],
    "phm_layer": False,
    "stochastic_depth": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options, under AdapterHub's names.

    Attributes:
      kind: `houlsby`, `pfeiffer` or `parallel`.
      reduction_factor: The layer's width over the bottleneck's; 0 is the kind's own.
      non_linearity: Of the bottleneck; "" is the kind's own.
      scaling: What its output is multiplied by; 0 is the kind's own.
      dropout: Share of its output that is dropped in training.
      modules_to_save: A regex on names of modules that are trained whole; "" is none.
      name: AdapterHub's name of the adapter, which its tensors have in theirs.
    """

    kind: str = "pfeiffer"
    reduction_factor: float = 0
    non_linearity: str = ""
    scaling: float = 0
    dropout: float = 0.0
    modules_to_save: str = ""
    name: str = "default"

    def __post_init__(self):
        check_name("peft.kind", self.kind, KINDS)
        check_name("peft.non_linearity", self.own("non_linearity"), ACTIVATIONS)
        if self.reduction_factor < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"peft.reduction_factor={self.reduction_factor} and "
                f"peft.dropout={self.dropout}: the first is positive, the second in "
                "[0, 1)"
            )

    def own(self, option: str) -> Any:
        """An option's value, or the kind's."""
        return getattr(self, option) or getattr(KINDS[self.kind], option)


def from_peft(adapter_config: Mapping[str, Any]) -> Config:
    """The options that AdapterHub's `adapter_config.json` stands for.

    Raises:
      UserError: It is no bottleneck adapter, or one that is not implemented.
    """
    described = {"dropout": 0.0, "scaling": 1.0, "is_parallel": False}
    described |= adapter_config["config"] or {}
    others = {k: v for k, v in FIXED.items() if described.get(k, v) != v}
    reads = "residual" if described["is_parallel"] else "output"
    if described.get("original_ln_before"):
        reads = "sum"
    places = tuple(place for place in SUBLAYERS if described.get(place))
    kind = next(
        (n for n, k in KINDS.items() if (k.places, k.reads) == (places, reads)), None
    )
    numbers = described.get("reduction_factor"), described["scaling"]
    if kind is None or others or not all(isinstance(n, int | float) for n in numbers):
        wrong = {k: described[k] for k in others} or described
        raise UserError(
            f"the adapter is none of {', '.join(KINDS)}, or uses parts of AdapterHub's "
            f"library that fjft lacks: {wrong}"
        )
    non_linearity = described["non_linearity"]
    if "version" not in adapter_config and non_linearity == "gelu":
        non_linearity = "gelu_new"  # which the oldest files mean by it
    return Config(
        kind=kind,
        reduction_factor=described["reduction_factor"],
        non_linearity=non_linearity,
        scaling=described["scaling"],
        dropout=described["dropout"],
        modules_to_save=adapter_config.get("modules_to_save") or "",
        name=adapter_config["name"],
    )
