"""A workload put to the test: the launches of its plans, their right answers, how far off they are.

Nothing is timed here; what is timed elsewhere should have passed ``Trial.check``.
"""

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import autograd, launcher, launches, layout, settings
from triton_gn.ops.call import Call
from triton_gn.plan import Config
from triton_gn.reference import Operands, compute_dtype
from triton_gn.tools.workloads import Workload

EPS = 1e-5
# what sums of many terms may lose in float32 and in float64; tests/kernels asks for ten times less
_ARITHMETIC = {torch.float32: 1e-5, torch.float64: 1e-12}


def tolerance(result: Tensor, x: Tensor) -> float:
    """The error that rounding explains, over the largest value.

    Half an eps of its dtype for the result's own rounding, as much again to spare, and what the
    arithmetic on x loses.
    """
    return torch.finfo(result.dtype).eps + _ARITHMETIC[compute_dtype(x)]


def errors_of(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each output the largest error over the largest expected value; inf if it holds a NaN.

    pre_add's gradient is a sum whose terms, of x's gradient, cancel: there it is the largest sum of
    their sizes.
    """

    def error(name: str) -> float:
        scale = expected[name].abs().max()
        if name == "pre_add" and "x" in expected:
            n, channels = expected["pre_add"].shape
            scale = expected["x"].abs().reshape(n, channels, -1).sum(2).max()
        worst = (outputs[name].double() - expected[name]).abs().max()
        error = float(worst / scale.clamp(min=torch.finfo(scale.dtype).tiny))
        return math.inf if math.isnan(error) else error

    return {name: error(name) for name in expected}


def error_of(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest of ``errors_of``."""
    return max(errors_of(outputs, expected).values())


class Trial:
    """Random operands of a workload, and outputs that any of its plans can be run into.

    ``operands`` and ``dy`` are what its runs read. Nothing is cut into parts: while a right answer
    is worked out in float64, it takes some ten times the 8 bytes that x then has per element.

    Args:
        workload: what to try.
        device: a GPU, or under TRITON_INTERPRET=1 the CPU.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.workload, self.operands = workload, workload.operands(device)
        x = self.operands.x
        self.dy = layout.empty_like(x).normal_(generator=torch.Generator(device).manual_seed(1))
        self._stats = launches.statistics(x, workload.n, workload.groups, 3)
        self._outputs: dict[str, dict[str, Tensor]] = {}
        self._expected: dict[str, dict[str, Tensor]] = {}

    def outputs(self, direction: str) -> dict[str, Tensor]:
        """What ``run`` fills: y, or the gradients by the names of their operands."""
        if direction not in self._outputs:
            given = self._given(direction)
            self._outputs[direction] = (
                {"y": layout.empty_like(given.x)}
                if direction == "forward"
                else autograd.empty_gradients(given, [t is not None for t in given])
            )
        return self._outputs[direction]

    def expected(self, direction: str) -> dict[str, Tensor]:
        """What they should hold: the formulas in float64, on the operands' device."""
        if direction not in self._expected:
            given = self._given(direction)
            exact = Operands._make(None if t is None else t.double() for t in given)
            groups, activation = self.workload.groups, self.workload.activation
            if direction == "forward":
                answers = [reference.group_norm(exact, groups, EPS, activation)]
            else:
                dy, needs = self.dy.double(), [t is not None for t in exact]
                answers = reference.gradients(dy, exact, groups, EPS, activation, needs)
            self._expected[direction] = dict(zip(self.outputs(direction), answers, strict=True))
        return self._expected[direction]

    def run(self, direction: str, config: Config | None = None) -> None:
        """Launch the kernels of a plan; of the one that a call in this thread takes, without."""
        if direction == "forward":
            self._forward(self._stats, config)
            return
        given, grads = self._given(direction), self.outputs(direction)
        launcher.backward(given, self._call, self.dy, self._kept_stats, grads, config=config)

    def errors(self, direction: str, config: Config | None = None) -> dict[str, float]:
        """Of each output, as ``errors_of``; inf as well where an element is not written."""
        for output in self.outputs(direction).values():
            output.fill_(math.nan)
        self.run(direction, config)
        return errors_of(self.outputs(direction), self.expected(direction))

    def error(self, direction: str, config: Config | None = None) -> float:
        """The largest of ``errors``."""
        return max(self.errors(direction, config).values())

    def check(self, direction: str, config: Config | None = None) -> str | None:
        """How the answer is wrong; None if it is right."""
        for name, error in self.errors(direction, config).items():
            limit = tolerance(self.outputs(direction)[name], self.operands.x)
            if error > limit:
                return (
                    f"{name} is off by {error:.1e} of its largest value, and rounding explains "
                    f"{limit:.1e}"
                )
        return None

    def spills(self, direction: str, config: Config | None = None) -> int:
        """Registers of a thread that kernels spill to memory; 0 where nothing is compiled."""
        with launcher.recording() as calls:
            self.run(direction, config)
        nvidia = self.dy.is_cuda and torch.version.hip is None
        kernels = [
            one.kernel.warmup(
                grid=(one.grid,), **one.arguments_on(nvidia), **one.options(nvidia)
            )  # compiled by the run: this finds it
            for call in calls
            for one in call.launches
        ]
        return sum(getattr(kernel, "n_spills", 0) for kernel in kernels)

    def _given(self, direction: str) -> Operands:
        return self.workload.given(self.operands, direction)

    def _forward(self, stats: Tensor, config: Config | None) -> None:
        y = self.outputs("forward")["y"]
        launcher.forward(self.operands, self._call, y, stats, config=config)

    @property
    def _call(self) -> Call:
        workload, y_dtype = self.workload, self.operands.x.dtype
        return Call(workload.groups, EPS, workload.activation, y_dtype, settings.current())

    @functools.cached_property
    def _kept_stats(self) -> Tensor:
        """What the backward reads: not the last forward's, whose plan may be a wrong one."""
        stats = torch.empty_like(self._stats)
        self._forward(stats, None)
        return stats
