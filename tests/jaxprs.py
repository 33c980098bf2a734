"""Walking everything that a function does."""

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shape of everything that is worked out."""
    return {
        tuple(var.aval.shape)
        for equation in equations(jaxpr)
        for var in equation.outvars
        if hasattr(var.aval, "shape")
    }


def products(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of all matrix products' results."""
    return [
        tuple(equation.outvars[0].aval.shape)
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general"
    ]
