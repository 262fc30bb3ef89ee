"""Who computes a workload: triton_gn, its peers, and the floors that nobody gets below.

A peer is called as its users would call it. What it does not fuse runs around it as PyTorch's own
operations, in x's dtype. Only a call whose answer is right comes out of ``checked``.
"""

import math
from collections.abc import Callable, Mapping
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
from triton_gn.reference import ACTIVATIONS, Operands
from triton_gn.tools.verify import EPS, Trial, errors_of, tolerance
from triton_gn.tools.workloads import Workload

Compute = Callable[[Operands], Tensor]
Norm = Callable[[Tensor, int, Tensor, Tensor], Tensor]  # x, groups, weight, bias

PARTS = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
FIXED = STRATEGIES + UNVERIFIED  # strategies that are timed beside what the rule chooses
_PEER_ROUNDINGS = 8  # after each operation, and of statistics that are kept in x's dtype
_BLOCK, _BLOCK_WARPS = 4096, 8  # of the floors: four 16-byte accesses a thread


@dataclass(frozen=True)
class Provider:
    """One way to compute workloads; ``compute`` makes the function of a workload's operands."""

    name: str
    compute: Callable[[Workload], Compute]
    absent: Callable[[torch.device], str | None]  # why it cannot run on a device
    roundings: int = _PEER_ROUNDINGS  # how often its answers may be rounded

    @property
    def is_fixed(self) -> bool:
        """Whether it is triton_gn with a strategy that is fixed."""
        return self.name.startswith(f"{OURS}[")


def ours(workload: Workload) -> Compute:
    """triton_gn as it is."""

    def compute(operands: Operands) -> Tensor:
        x, weight, bias, *fused = operands
        names = operands._fields[3:]
        return triton_gn.group_norm(
            x, workload.groups, weight, bias, EPS, activation=workload.activation,
            **dict(zip(names, fused, strict=True)),
        )  # fmt: skip

    return compute


def with_strategy(strategy: str, workload: Workload) -> Compute:
    """triton_gn, with the strategy of its plans fixed."""
    compute = ours(workload)

    def overridden(operands: Operands) -> Tensor:
        with triton_gn.plan_override(strategy=strategy):
            return compute(operands)

    return overridden


def unfused(norm: Norm, workload: Workload) -> Compute:
    """A plain GroupNorm with the operations before and after it."""

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
        return ACTIVATIONS[workload.activation](z)

    return compute


def torchs(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's, which takes parameters of x's dtype alone: casting them costs the least."""
    return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), EPS)


def compiled(workload: Workload) -> Compute:
    """The same under torch.compile, with all the effort that it can make.

    Not with CUDA graphs: the stopwatch captures every provider's calls itself.
    """
    torch.compiler.reset()  # else the limit of recompilations makes later workloads eager
    torch._functorch.config.donated_buffer = False  # so that a backward can run again
    function = unfused(torchs, workload)
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def ligers(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """Liger's, on three dimensions: with more, the backward of older versions is out of bounds."""
    function = import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    flat = x.reshape(*x.shape[:2], -1)
    y: Tensor = function.apply(flat, weight, bias, x.shape[1], groups, EPS)
    return y.reshape(x.shape)


class FlagGemsFunction(torch.autograd.Function):
    """FlagGems' two operators, which it would otherwise put in place of PyTorch's for everybody."""

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


PROVIDERS = (
    Provider(OURS, ours, _no_kernels, roundings=1),
    *(
        Provider(f"{OURS}[{strategy}]", partial(with_strategy, strategy), _no_kernels, roundings=1)
        for strategy in FIXED
    ),
    Provider("torch_eager", partial(unfused, torchs), lambda _: None),
    Provider("torch_compile", compiled, _no_gpu),
    Provider("liger", partial(unfused, ligers), partial(_not_installed, "liger_kernel")),
    Provider(
        "flag_gems",
        partial(unfused, FlagGemsFunction.apply),
        partial(_not_installed, "flag_gems"),
    ),
)


class Call:
    """A provider's call for a workload and a direction; each launches the same work.

    "forward" records nothing, "backward" runs on a recorded forward that is kept, "both" is a
    forward that records and its backward. ``names`` are those of the results: y, and of the
    gradients those of their operands.
    """

    def __init__(self, compute: Compute, operands: Operands, dy: Tensor, direction: str) -> None:
        given = {name: t for name, t in operands._asdict().items() if t is not None}
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        self._compute, self._operands, self._dy = compute, operands, dy
        self._recording, self._leaves = Operands(**leaves), list(leaves.values())
        self._kept: tuple[torch.cuda.Stream | None, Tensor] | None = None
        self._run: Callable[[], tuple[Tensor, ...]] = getattr(self, f"_{direction}")
        self.names = [
            *["y"] * (direction != "backward"),
            *(given if direction != "forward" else ()),
        ]

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run()

    def _forward(self) -> tuple[Tensor, ...]:
        return (self._compute(self._operands),)

    def _backward(self) -> tuple[Tensor, ...]:
        # autograd runs a backward on its forward's stream, which a capture must not leave; what an
        # earlier capture has used may go, as it is not replayed any more
        stream = torch.cuda.current_stream() if self._dy.is_cuda else None
        if self._kept is None or self._kept[0] != stream:
            self._kept = stream, self._compute(self._recording)
        return torch.autograd.grad(self._kept[1], self._leaves, self._dy, retain_graph=True)

    def _both(self) -> tuple[Tensor, ...]:
        y = self._compute(self._recording)
        return y, *torch.autograd.grad(y, self._leaves, self._dy)


def checked(
    provider: Provider, trial: Trial, direction: str, answers: Mapping[str, Tensor]
) -> tuple[Call | None, dict[str, Any]]:
    """A provider's call, None unless its answer is right, and what a record says of it."""
    workload = trial.workload
    try:
        call = Call(provider.compute(workload), trial.operands, trial.dy, direction)
        with launcher.recording() as plans:
            results = {k: t.detach() for k, t in zip(call.names, call(), strict=True)}
        errors = errors_of(results, answers)
    except Exception as error:  # whatever the provider, the compiler or the driver has against it
        return None, {"skipped": failure(error)}
    if fault := wrong(errors, results, trial.operands.x, provider.roundings):
        return None, {"skipped": fault}
    # a backward's call makes the forward that it needs
    used = [one.config for one in plans if one.problem.direction in PARTS[direction]]
    return call, {
        "error": max(errors.values()),
        "strategy": " + ".join(dict.fromkeys(one.strategy for one in used)) or None,
        "config": fields_of(used[0]) if len(used) == 1 else None,
    }


def answers_of(trial: Trial, direction: str) -> dict[str, Tensor]:
    """What the results of a direction should be, by name."""
    return {k: answer for part in PARTS[direction] for k, answer in trial.expected(part).items()}


def failure(error: Exception) -> str:
    """An exception, in a line."""
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]


def wrong(
    errors: Mapping[str, float], results: Mapping[str, Tensor], x: Tensor, roundings: int = 1
) -> str | None:
    """What is wrong with results; None if so many roundings explain it, all but the last to x's
    dtype."""
    for name, error in errors.items():
        limit = tolerance(results[name], x) + (roundings - 1) * tolerance(x, x)
        if not error <= limit:
            return (
                f"wrong: {name} is off by {error:.1e} of its largest value, and rounding explains "
                f"{limit:.1e}"
            )
    return None


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


def floor(part: str, count: int, device: torch.device) -> Callable[[], object]:
    """A call that moves so many bytes, rounded up to whole accesses: 1 or 2 reads and 1 write."""
    kernel, tensors = (copy_kernel, 2) if part == "forward" else (add_kernel, 3)
    size = 16 * math.ceil(count / (tensors * 4 * 16))
    arguments = [*(torch.randn(size, device=device) for _ in range(tensors)), size]
    grid = (triton.cdiv(size, _BLOCK),)
    # Triton asks for a choice of enable_fp_fusion
    options = {"BLOCK": _BLOCK, "num_warps": _BLOCK_WARPS, "enable_fp_fusion": True}
    return partial(kernel[grid], *arguments, **options)


def bytes_minimum(workload: Workload, direction: str) -> int:
    """Bytes of a call's operands and results, each touched once in a forward and in a backward."""
    if direction == "both":
        return sum(bytes_minimum(workload, part) for part in PARTS[direction])
    operands = workload.given(workload.operands("meta"), direction)
    given = sum(t.nbytes for t in operands if t is not None)
    return given + operands.x.nbytes + given * (direction == "backward")
