"""Compile every kernel that a model needs into Triton's cache, before its first step.

The kernels of a step, forward and backward, are foreseen without running it. They are compiled in
parallel processes for this GPU, or for a target that need not be present.
"""

import argparse
import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from triton_gn.ops.device import gpu_of, target_of
from triton_gn.plan import TARGETS, Device
from triton_gn.tools.compile import cache_key, compile_into_cache
from triton_gn.tools.inspection import gpu_named, in_processes, tracked
from triton_gn.tools.model import Foreseen, foreseen, made_by


@dataclass(frozen=True)
class Warmup:
    """Numbers of calls and kernels, seconds and failures; ``print`` gives a sentence."""

    calls: int  # of the kernels in a step, each signature once
    kernels: int  # that they need, each once
    target: str
    seconds: float
    failures: tuple[str, ...]  # the compiler's message for each kernel that does not compile

    def __str__(self) -> str:
        """Return a sentence, and a line for each failure."""
        text = (
            f"{self.kernels - len(self.failures)} of {self.kernels} kernels for {self.calls} calls "
            f"compiled for {self.target} in {self.seconds:.1f} s."
        )
        return "\n".join([text, *self.failures])


def warmup(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str | None = None,
    processes: int | None = None,
) -> Warmup:
    """Compile all kernels of a model's step; see :func:`triton_gn.warmup`."""
    start = time.monotonic()
    gpu, name = _gpu(target)
    calls = foreseen(model, args, kwargs or {})
    jobs: dict[tuple[str, ...], tuple[Foreseen, int]] = {}
    for call in calls:
        for index, launch in enumerate(call.launches(gpu)):
            jobs.setdefault(cache_key(launch, name), (call, index))
    compile_one = functools.partial(_compile, gpu=gpu, target=name)
    count = processes or os.cpu_count() or 1
    messages = in_processes(compile_one, list(jobs.values()), count)
    failures = tuple(filter(None, tracked(messages, len(jobs), "compiling")))
    return Warmup(len(calls), len(jobs), name, time.monotonic() - start, failures)


def _gpu(target: str | None) -> tuple[Device, str]:
    if target is not None:
        return gpu_named(target), target
    if not torch.cuda.is_available():
        raise ValueError(
            "kernels are compiled for the GPU of this machine, but torch.cuda.is_available() is "
            f"False here. Name another with target, one of {', '.join(TARGETS)}."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return gpu_of(device), target_of(device)


def _compile(job: tuple[Foreseen, int], gpu: Device, target: str) -> str:
    """Compile one launch of a call; return the compiler's message, "" if there is none."""
    call, index = job
    launch = call.launches(gpu)[index]
    try:
        compile_into_cache(launch, target)
    except Exception as error:  # the other kernels are worth having
        return f"{launch.kernel.__name__}: {type(error).__name__}: {error}"
    return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m triton_gn warmup``."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FACTORY",
        help="FACTORY() returns the model and its arguments, a tuple or a dict",
    )
    parser.add_argument("--target", choices=TARGETS, help="default: the GPU of this machine")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each core")
    parser.add_argument(
        "--inference", action="store_true", help="only the forward, as under torch.no_grad()"
    )


def run(options: argparse.Namespace) -> int:
    """Compile and print the outcome; return the exit status, 1 if a kernel does not compile."""
    model, args, kwargs = made_by(options.model)
    with torch.set_grad_enabled(not options.inference):
        outcome = warmup(model, args, kwargs, target=options.target, processes=options.processes)
    print(outcome)
    return bool(outcome.failures)
