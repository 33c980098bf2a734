"""The command `fjft`: finds the command that is meant, and says what went wrong."""

import argparse
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from fjft.errors import UserError

COMMANDS = {
    "train": "fine-tune a model as a config says",
    "evaluate": "the objective's loss and metrics on held-out data",
    "generate": "let a model answer prompts",
    "export": "write a run's adapter, or a whole Hugging Face model",
    "plan": "tell whether a config fits its hardware, and how fast it is at best",
    "search": "try options of a config, and find the best",
    "bench": "time the train step of a config",
}
EXAMPLE = """\
examples:
  fjft train --config=configs/smollm2_lora_quickstart.py
  fjft train --config=configs/smollm2_lora_quickstart.py:smoke --config.train.max_steps=4
  fjft COMMAND --help
"""  # noqa: E501


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: What stands behind `fjft`; the process's own arguments when None.

    Returns:
      The exit code: 0 is good, 1 what the user can mend, 130 an interruption. A wrong
      use of flags exits with 2; any other exception is a bug and keeps its trace.
    """
    is_own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        return _without_command(argv)
    if is_own_process:
        _take_large_pages()
    _quieten_libraries()
    _take_memory()
    if is_own_process and not {"-h", "--help"} & set(argv):
        _leave_out_torch()
    debug = "--debug" in argv
    try:
        command = importlib.import_module(f"fjft.cli.{argv[0]}")
        command.run(command.make_parser(), argv[1:])
    except KeyboardInterrupt:
        print("fjft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough; what is buffered cannot be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        explained = explain(error)
        if explained is None or debug:
            raise
        print(f"fjft: {explained}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception) -> str | None:
    """One line about an error that the user can mend; None for a bug."""
    text = str(error)
    if isinstance(error, UserError):
        return " ".join(line.strip() for line in text.splitlines())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"no space left{where}; free some, or name another directory by "
            "--config.checkpoint.directory=... or the variable TMPDIR"
        )
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}; name a place you may write to"
    out_of_memory = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return (
            "out of memory; lower train.batch_size or data.max_length, raise "
            "train.accumulation_steps, or set model.remat=full, model.dtype=bfloat16 "
            "or a larger mesh.fsdp (--debug shows where it happened)"
        )
    return None


def _without_command(argv: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fjft",
        usage="fjft COMMAND [flags]",
        description="Fine-tunes Hugging Face language models in JAX and Flax.",
        epilog=f"commands:\n{listed}\n\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"fjft {importlib.metadata.version('fjft')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    chosen, _ = parser.parse_known_args(argv)
    what = f"unknown command {chosen.command!r}" if chosen.command else "no command"
    parser.error(f"{what}; use one of {', '.join(COMMANDS)}")


def _quieten_libraries() -> None:
    """Leaves out what libraries say that the user of this program cannot act on."""
    # transformers notes at import that it found no torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Orbax logs its own steps, through absl.
    logging.getLogger("absl").setLevel(logging.ERROR)


def _leave_out_torch() -> None:
    """Imports transformers as if PyTorch were not there, and nothing else so.

    Where it is, transformers imports it, which takes seconds and memory for nothing.
    """
    if "torch" not in sys.modules:
        hidden: dict[str, Any] = sys.modules  # None makes an import fail.
        hidden["torch"] = None
        importlib.import_module("transformers.configuration_utils")
        del hidden["torch"]


def _take_large_pages() -> None:
    """Starts the process anew, so that Linux gives it memory in pages of megabytes.

    glibc asks for them only if it is told so before a program begins. A train step on a
    CPU touches gigabytes that are new to it, and spends up to a sixth of its time on
    pages of 4 KiB.
    """
    can_start = sys.platform == "linux" and sys.executable
    if can_start and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _take_memory() -> None:
    """Lets JAX have more of a GPU's memory than the three quarters that it would take.

    What is left is for CUDA and its libraries. `fjft plan` reads the same variable.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


if __name__ == "__main__":
    sys.exit(main())
