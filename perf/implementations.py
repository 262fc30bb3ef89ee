"""Implementations to time: triton_gn, its peers, and copies and additions at the speed of light.

A peer is called as its users call it. Operations that it does not fuse run around it as PyTorch's
own, in x's dtype. ``checked`` returns only calls whose answers are right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

import triton_gn
from perf.records import OURS
from triton_gn.ops import dispatch, launcher
from triton_gn.plan import STRATEGIES, UNVERIFIED, fields_of
from triton_gn.reference import Operands, activation_function
from triton_gn.tools.verify import EPS, Verifier, errors_of, fault_of
from triton_gn.tools.workloads import Workload

Compute = Callable[[Operands], Tensor]
Norm = Callable[[Tensor, int, Tensor, Tensor], Tensor]  # x, groups, weight, bias

PARTS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
FIXED = STRATEGIES + UNVERIFIED  # strategies that are timed besides the default config
_PEER_ROUNDINGS = 8  # one per operation, and those of statistics in x's dtype
_BLOCK, _BLOCK_WARPS = 4096, 8  # copies and additions: four 16-byte accesses per thread


@dataclass(frozen=True)
class Implementation:
    """One way to compute workloads; ``compute`` returns a function of a workload's operands."""

    name: str
    compute: Callable[[Workload], Compute]
    absent: Callable[[torch.device], str | None]  # why it cannot run on a device
    roundings: int = _PEER_ROUNDINGS  # roundings that its answers may have

    @property
    def is_fixed(self) -> bool:
        """Return whether it is triton_gn with a fixed strategy."""
        return self.name.startswith(f"{OURS}[")


def ours(workload: Workload) -> Compute:
    """Return triton_gn's fused call."""

    def compute(operands: Operands) -> Tensor:
        x, weight, bias, *fused = operands
        names = operands._fields[3:]
        return triton_gn.group_norm(
            x, workload.groups, weight, bias, EPS, activation=workload.activation,
            **dict(zip(names, fused, strict=True)),
        )  # fmt: skip

    return compute


def with_strategy(strategy: str, workload: Workload) -> Compute:
    """Return triton_gn's fused call with a fixed strategy."""
    compute = ours(workload)

    def overridden(operands: Operands) -> Tensor:
        with triton_gn.plan_override(strategy=strategy):
            return compute(operands)

    return overridden


def unfused(norm: Norm, workload: Workload) -> Compute:
    """Return a plain GroupNorm with the operations before and after it."""

    def compute(operands: Operands) -> Tensor:
        x, weight, bias, scale, shift, pre_add, residual = operands
        assert weight is not None
        assert bias is not None

        def per_pixel(values: Tensor) -> Tensor:
            return values.to(x.dtype).reshape(*values.shape, *[1] * (x.ndim - 2))

        z = norm(x if pre_add is None else x + per_pixel(pre_add), workload.groups, weight, bias)
        if scale is not None:
            z = z * (1 + per_pixel(scale))
        if shift is not None:
            z = z + per_pixel(shift)
        if residual is not None:
            z = z + residual
        return activation_function(workload.activation)(z)

    return compute


def torchs(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Call PyTorch's GroupNorm. It takes parameters of x's dtype only; casting them is cheapest."""
    return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), EPS)


def compiled(workload: Workload) -> Compute:
    """Return the unfused call under torch.compile with max-autotune.

    The stopwatch captures all calls itself, so torch.compile uses no CUDA graphs.
    """
    torch.compiler.reset()  # beyond the recompile limit later workloads would run eagerly
    torch._functorch.config.donated_buffer = False  # so that a backward can run again
    function = unfused(torchs, workload)
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def ligers(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Call Liger's on three dimensions; with more, older backwards are out of bounds."""
    function = import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    flat = x.reshape(*x.shape[:2], -1)
    y: Tensor = function.apply(flat, weight, bias, x.shape[1], groups, EPS)
    return y.reshape(x.shape)


class FlagGemsFunction(torch.autograd.Function):
    """FlagGems' operators, without its global replacement of PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        ctx.sizes = n, channels, x.numel() // (n * channels), groups
        y: Tensor
        y, *stats = import_module("flag_gems").group_norm(x, weight, bias, *ctx.sizes, EPS)
        ctx.save_for_backward(x, *stats, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        function = import_module("flag_gems").group_norm_backward
        dx, dweight, dbias = function(dy, *ctx.saved_tensors, *ctx.sizes, [True] * 3)
        return dx, None, dweight, dbias


def _no_kernels(device: torch.device) -> str | None:
    return dispatch.why_not_kernels(torch.empty(0, device=device))


def _no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it needs a GPU; the device is {device}"


def _not_installed(package: str, device: torch.device) -> str | None:
    if find_spec(package) is None:
        return f"it is not installed (pip install {package.replace('_', '-')})"
    return _no_gpu(device)


IMPLEMENTATIONS = (
    Implementation(OURS, ours, _no_kernels, roundings=1),
    *(
        Implementation(
            f"{OURS}[{strategy}]", partial(with_strategy, strategy), _no_kernels, roundings=1
        )
        for strategy in FIXED
    ),
    Implementation("torch_eager", partial(unfused, torchs), lambda _: None),
    Implementation("torch_compile", compiled, _no_gpu),
    Implementation("liger", partial(unfused, ligers), partial(_not_installed, "liger_kernel")),
    Implementation(
        "flag_gems",
        partial(unfused, FlagGemsFunction.apply),
        partial(_not_installed, "flag_gems"),
    ),
)


class Call:
    """An implementation's call for a workload and a direction; each call launches the same work.

    "forward" records no gradients, "backward" runs again on a kept forward, "both" is a recording
    forward and its backward. ``names`` are the results': y, and a gradient's operand.
    """

    def __init__(self, compute: Compute, operands: Operands, dy: Tensor, direction: str) -> None:
        present = {name: t for name, t in operands._asdict().items() if t is not None}
        leaves = {name: t.detach().requires_grad_() for name, t in present.items()}
        self._compute, self._operands, self._dy = compute, operands, dy
        self._recording, self._leaves = Operands(**leaves), list(leaves.values())
        self._kept: tuple[torch.cuda.Stream | None, Tensor] | None = None
        self._run: Callable[[], tuple[Tensor, ...]] = getattr(self, f"_{direction}")
        self.names = [
            *["y"] * (direction != "backward"),
            *(present if direction != "forward" else ()),
        ]

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run()

    def _forward(self) -> tuple[Tensor, ...]:
        return (self._compute(self._operands),)

    def _backward(self) -> tuple[Tensor, ...]:
        # autograd runs a backward on its forward's stream, and a capture must stay on its own
        # stream; the forward of an earlier capture is not needed any more
        stream = torch.cuda.current_stream() if self._dy.is_cuda else None
        if self._kept is None or self._kept[0] != stream:
            self._kept = stream, self._compute(self._recording)
        return torch.autograd.grad(self._kept[1], self._leaves, self._dy, retain_graph=True)

    def _both(self) -> tuple[Tensor, ...]:
        y = self._compute(self._recording)
        return y, *torch.autograd.grad(y, self._leaves, self._dy)


def checked(
    implementation: Implementation, verifier: Verifier, direction: str
) -> tuple[Call | None, dict[str, Any]]:
    """Return an implementation's call, or None if its answer is wrong, and fields of its record."""
    workload = verifier.workload
    answers = answers_of(verifier, direction)
    try:
        call = Call(implementation.compute(workload), verifier.operands, verifier.dy, direction)
        with launcher.recording() as launched:
            results = {k: t.detach() for k, t in zip(call.names, call(), strict=True)}
        errors = errors_of(results, answers)
    except Exception as error:  # the implementation's, the compiler's or the driver's
        return None, {"skipped": failure(error)}
    fault = fault_of(errors, results, verifier.operands.x, implementation.roundings)
    if fault is not None:
        return None, {"skipped": fault}
    # the call of a backward also runs the forward that it needs
    configs = [one.config for one in launched if one.problem.direction in PARTS[direction]]
    return call, {
        "error": max(errors.values()),
        "strategy": " + ".join(dict.fromkeys(config.strategy for config in configs)) or None,
        "config": fields_of(configs[0]) if len(configs) == 1 else None,
    }


def answers_of(verifier: Verifier, direction: str) -> dict[str, Tensor]:
    """Return the right results of a direction by name."""
    return {k: answer for part in PARTS[direction] for k, answer in verifier.expected(part).items()}


def failure(error: Exception) -> str:
    """Return an exception as one line."""
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask), mask)


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(a_ptr, b_ptr, y_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, tl.load(a_ptr + offsets, mask) + tl.load(b_ptr + offsets, mask), mask)


def speed_of_light(part: str, count: int, device: torch.device) -> Callable[[], object]:
    """Return a copy (forward) or an addition (backward) that moves ``count`` bytes.

    The count is rounded up to whole accesses.
    """
    kernel, tensors = (copy_kernel, 2) if part == "forward" else (add_kernel, 3)
    size = 16 * math.ceil(count / (tensors * 4 * 16))
    arguments = [*(torch.randn(size, device=device) for _ in range(tensors)), size]
    grid = (triton.cdiv(size, _BLOCK),)
    # Triton asks for a choice of enable_fp_fusion
    options = {"BLOCK": _BLOCK, "num_warps": _BLOCK_WARPS, "enable_fp_fusion": True}
    return partial(kernel[grid], *arguments, **options)


def bytes_minimum(workload: Workload, direction: str) -> int:
    """Return the bytes of a call's operands and results, each touched once per direction."""
    if direction == "both":
        return sum(bytes_minimum(workload, part) for part in PARTS[direction])
    operands = workload.kernel_operands(workload.operands("meta"), direction)
    present = sum(t.nbytes for t in operands if t is not None)
    return present + operands.x.nbytes + present * (direction == "backward")
