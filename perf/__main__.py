"""Time triton_gn and its peers, compare and draw the results."""

import argparse
import sys
from collections.abc import Sequence

from triton_gn.__main__ import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: well, 1: it found a fault, 2: it could not run, 130: after Ctrl-C.
    """
    try:
        from perf import (
            accuracy,
            bench,
            calls,
            ceilings,
            compare,
            coverage,
            cpu,
            demo,
            gpu,
            host,
            kernels,
            machine_code,
            plot,
            sweep,
            traffic,
        )
    except ModuleNotFoundError as error:
        print(f"{error}. Remedy: pip install -e '.[cli,perf]'", file=sys.stderr)
        return 2

    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    return run_command(
        parser,
        arguments,
        ("bench", bench, "time all implementations of GroupNorm on this GPU"),
        ("sweep", sweep, "time the plans of a problem, or compile them for other GPUs"),
        ("compare", compare, "compare two results, or two git revisions on this GPU"),
        ("plot", plot, "draw results as figures"),
        ("demo", demo, "draw a small sweep, with or without a GPU"),
        ("ceilings", ceilings, "measure copies, additions and the effective L2 of this GPU"),
        ("gpu", gpu, "run tests, ceilings, core benchmark, short tune and figures on this GPU"),
        ("calls", calls, "count the Python calls of a warm call, without a GPU"),
        ("host", host, "measure the host cost of a call, with or without a GPU"),
        ("cpu", cpu, "time the CPU path over PyTorch's own operations, without a GPU"),
        ("machine-code", machine_code, "compile kernels and peers' for sm_90, count instructions"),
        ("accuracy", accuracy, "measure errors of kernels and peers' against float64"),
        ("traffic", traffic, "count bytes and launches of kernels and peers' in the interpreter"),
        ("coverage", coverage, "count what is fused in public models, without a GPU"),
        ("kernels", kernels, "count the kernels that a training step of each model compiles"),
    )


if __name__ == "__main__":
    sys.exit(main())
