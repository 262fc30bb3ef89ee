"""``python -m perf``: time triton_gn and its peers, compare and draw the results."""

import argparse
import sys
from collections.abc import Sequence

from triton_gn.__main__ import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 well, 1 it found something wrong, 2 it could not
    run, 130 after Ctrl-C."""
    try:
        from perf import bench, ceilings, compare, cpu, demo, gpu, host, kernels, plot, sweep
    except ModuleNotFoundError as error:
        print(f"{error}. Remedy: pip install -e '.[cli,perf]'", file=sys.stderr)
        return 2

    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    return run_command(
        parser,
        arguments,
        ("bench", bench, "time all providers of GroupNorm on this GPU"),
        ("sweep", sweep, "time the plans of a problem, or compile them for other GPUs"),
        ("compare", compare, "compare two results, or two git revisions on this GPU"),
        ("plot", plot, "draw results as figures"),
        ("demo", demo, "a small sweep and its pictures, with or without a GPU"),
        ("ceilings", ceilings, "measure copies, additions and what L2 holds on this GPU"),
        ("gpu", gpu, "tests, ceilings, core benchmark, short tune and figures on this GPU"),
        ("host", host, "what a call costs the host, with or without a GPU"),
        ("cpu", cpu, "time the CPU path over PyTorch's own operations, without a GPU"),
        ("kernels", kernels, "count the kernels that a training step of each model compiles"),
    )


if __name__ == "__main__":
    sys.exit(main())
