"""Draw a small sweep: timed on this GPU or, without one, predicted for three others."""

import argparse
from pathlib import Path

import torch

from perf import plot, sweep

FOLDER = Path("demo")
TARGETS = "sm_90,sm_80,gfx942"
SWEEP = "--shape 2x320x64x64 --groups 32 --activation silu --direction forward --candidates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--candidates", type=int, default=8, metavar="N", help="plans (8)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"({FOLDER})")


def run(options: argparse.Namespace) -> int:
    """Sweep, draw and print the paths of the pictures; return the exit status."""
    out = options.out / ("measured" if torch.cuda.is_available() else "predicted")
    flags = [*SWEEP.split(), str(options.candidates), "--out", str(out)]
    if not torch.cuda.is_available():
        flags += ["--target", TARGETS]
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    status = sweep.run(parser.parse_args(flags))
    pictures = plot.draw(plot.load([out]), options.out, only="sweep")
    print("Pictures:", *(path for path in pictures if path.suffix == ".png"), sep="\n  ")
    return status
