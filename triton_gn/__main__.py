"""Inspect plans for any GPU, tune them for this one, and compile a model's kernels."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: well, 1: it found a fault, 2: it could not run, 130: after Ctrl-C.
    """
    try:
        from triton_gn.tools import inspect, tune, warmup
    except ModuleNotFoundError as error:
        print(f"{error}. Remedy: pip install 'triton-gn[cli]'", file=sys.stderr)
        return 2

    parser = argparse.ArgumentParser(prog="python -m triton_gn", description=__doc__)
    return run_command(
        parser,
        arguments,
        ("inspect", inspect, "compile plans for any GPU, present or not, and report"),
        ("tune", tune, "time plans on this GPU and keep the fastest in a table"),
        ("warmup", warmup, "compile the kernels of a model into Triton's cache"),
    )


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    *modules: tuple[str, Any, str],
) -> int:
    """Run the command that the arguments name, and return its exit status.

    ``modules`` are triples of a command's name, its module with ``add_arguments`` and ``run``, and
    its help text.
    """
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, text in modules:
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
