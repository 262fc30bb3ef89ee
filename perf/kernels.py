"""Count the kernels that Triton would compile for a model's training steps."""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from perf.common import WORKLOADS
from triton_gn.ops.launches import Launch
from triton_gn.plan import TARGETS, plan
from triton_gn.tools import workloads
from triton_gn.tools.compile import cache_key
from triton_gn.tools.inspection import launches_of
from triton_gn.tools.workloads import Workload

# height and width of the latents of the images that SDXL is trained on
_SDXL = "SDXL UNet 1024px"
_SDXL_SIZES = (
    (128, 128), (144, 112), (152, 104), (168, 96), (176, 88), (192, 80), (112, 144), (104, 152),
    (96, 168), (88, 176), (80, 192), (136, 120), (120, 136), (160, 96), (184, 84),
)  # fmt: skip
_SDXL_BATCHES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--workloads", type=Path, default=WORKLOADS, metavar="FILE")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")


def run(options: argparse.Namespace) -> int:
    """Print the count for each model, and for SDXL's sizes of images; return the exit status."""
    models: dict[str, list[Workload]] = defaultdict(list)
    with options.workloads.open(newline="") as file:
        names = [row.get("model") or "without a model" for row in csv.DictReader(file)]
    for name, layer in zip(names, workloads.read(options.workloads), strict=True):
        models[name].append(layer)
    print(f"Kernels of one training step (forward and backward) on {options.target}")
    for model, layers in models.items():
        print(f"{count(layers, options.target):4d}  {model}")
    if _SDXL in models:
        sized = [one for size in _SDXL_SIZES for one in resized(models[_SDXL], size)]
        batches = [replace(one, n=n) for one in sized for n in _SDXL_BATCHES]
        print(f"{count(sized, options.target):4d}  {_SDXL}, {len(_SDXL_SIZES)} sizes of images")
        print(f"{count(batches, options.target):4d}  the same, batches of {_SDXL_BATCHES}")
    return 0


def resized(layers: Iterable[Workload], size: tuple[int, int]) -> Iterator[Workload]:
    """Yield the layers of a U-Net for 128x128 latents, on latents of another size."""
    for one in layers:
        factor = 128 // one.spatial[0]
        yield replace(one, spatial=(size[0] // factor, size[1] // factor))


def count(layers: Iterable[Workload], target: str) -> int:
    """Count the kernels of the layers' forwards and backwards, all gradients asked for."""
    return len({cache_key(one, target) for layer in layers for one in training_step(layer, target)})


def training_step(workload: Workload, target: str) -> Iterator[Launch]:
    """Yield the launches of a training step, on tensors without memory."""
    for problem in map(workload.problem, workloads.DIRECTIONS):
        _, launches = launches_of(workload, problem, plan(problem, TARGETS[target]))
        yield from launches
