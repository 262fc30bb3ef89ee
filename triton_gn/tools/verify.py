"""Verify plans: run the kernels of a workload and compare their answers with float64.

Nothing is timed here. A plan that is timed elsewhere should have passed ``Verifier.check``.
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
# relative loss of a sum of many terms; tests/kernels allows a tenth of it
_ARITHMETIC = {torch.float32: 1e-5, torch.float64: 1e-12}


def tolerance(result: Tensor, x: Tensor) -> float:
    """Return the error that rounding explains, relative to the largest value.

    This is half an eps of the result's dtype for its own rounding, another half to spare, and the
    loss of the arithmetic on x.
    """
    return torch.finfo(result.dtype).eps + _ARITHMETIC[compute_dtype(x)]


def errors_of(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each output's largest error over its largest expected value; inf if it holds a NaN.

    The gradient of pre_add is a sum of dx whose terms cancel. Its error is relative to the largest
    sum of their absolute values.
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


def fault_of(
    errors: Mapping[str, float], outputs: Mapping[str, Tensor], x: Tensor, roundings: int = 1
) -> str | None:
    """Say which output is wrong; None if rounding explains all errors.

    ``roundings`` allows for intermediate results that are rounded to x's dtype.
    """
    for name, error in errors.items():
        limit = tolerance(outputs[name], x) + (roundings - 1) * tolerance(x, x)
        if not error <= limit:
            return (
                f"wrong: {name} is off by {error:.1e} of its largest value, and rounding explains "
                f"{limit:.1e}"
            )
    return None


class Verifier:
    """Random operands of a workload, and outputs that any of its plans can be run into.

    ``operands`` and ``dy`` are the inputs of its runs. The float64 answer of the whole problem
    takes some ten times the 8 bytes that x then has per element.

    Args:
        workload: the workload to verify.
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
        """Return the tensors that ``run`` fills: y, or the gradients by name of their operand."""
        if direction not in self._outputs:
            operands = self._kernel_operands(direction)
            self._outputs[direction] = (
                {"y": layout.empty_like(operands.x)}
                if direction == "forward"
                else autograd.empty_gradients(operands, [t is not None for t in operands])
            )
        return self._outputs[direction]

    def expected(self, direction: str) -> dict[str, Tensor]:
        """Return the right outputs: the formulas in float64, on the operands' device."""
        if direction not in self._expected:
            operands = self._kernel_operands(direction)
            exact = Operands._make(None if t is None else t.double() for t in operands)
            groups, activation = self.workload.groups, self.workload.activation
            if direction == "forward":
                answers = [reference.group_norm(exact, groups, EPS, activation)]
            else:
                dy, needs = self.dy.double(), [t is not None for t in exact]
                answers = reference.gradients(dy, exact, groups, EPS, activation, needs)
            self._expected[direction] = dict(zip(self.outputs(direction), answers, strict=True))
        return self._expected[direction]

    def run(self, direction: str, config: Config | None = None) -> None:
        """Launch the kernels of a plan, or of the plan that a call in this thread takes."""
        if direction == "forward":
            self._forward(self._stats, config)
            return
        operands, grads = self._kernel_operands(direction), self.outputs(direction)
        launcher.backward(operands, self._call, self.dy, self._forward_stats, grads, config=config)

    def errors(self, direction: str, config: Config | None = None) -> dict[str, float]:
        """Run a plan and return ``errors_of`` its outputs; inf if an element is not written."""
        for output in self.outputs(direction).values():
            output.fill_(math.nan)
        self.run(direction, config)
        return errors_of(self.outputs(direction), self.expected(direction))

    def check(self, direction: str, config: Config | None = None) -> str | None:
        """Run a plan and return ``fault_of`` its outputs."""
        errors = self.errors(direction, config)
        return fault_of(errors, self.outputs(direction), self.operands.x)

    def spills(self, direction: str, config: Config | None = None) -> int:
        """Return the registers of a thread that kernels spill; 0 where nothing is compiled."""
        with launcher.recording() as calls:
            self.run(direction, config)
        nvidia = self.dy.is_cuda and torch.version.hip is None
        kernels = [
            launch.kernel.warmup(
                grid=(launch.grid,), **launch.arguments_on(nvidia), **launch.options(nvidia)
            )  # the run has compiled it: this is a look-up
            for call in calls
            for launch in call.launches
        ]
        return sum(getattr(kernel, "n_spills", 0) for kernel in kernels)

    def _kernel_operands(self, direction: str) -> Operands:
        return self.workload.kernel_operands(self.operands, direction)

    def _forward(self, stats: Tensor, config: Config | None) -> None:
        y = self.outputs("forward")["y"]
        launcher.forward(self.operands, self._call, y, stats, config=config)

    @property
    def _call(self) -> Call:
        workload, y_dtype = self.workload, self.operands.x.dtype
        return Call(workload.groups, EPS, workload.activation, y_dtype, settings.current())

    @functools.cached_property
    def _forward_stats(self) -> Tensor:
        """Statistics for the backward, from a plan that is not under test."""
        stats = torch.empty_like(self._stats)
        self._forward(stats, None)
        return stats
