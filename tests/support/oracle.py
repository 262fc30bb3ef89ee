"""Run one GroupNorm step through the kernels and in float64, and compare the results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import triton_gn
from tests.support.memory import GuardedMemory
from triton_gn import reference
from triton_gn.reference import Operands


@dataclass
class Case:
    """Operands of one step."""

    x: Tensor
    dy: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_add: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    eps: float = 1e-5

    @property
    def operands(self) -> Operands:
        return Operands(*(getattr(self, name) for name in Operands._fields))

    def expected(self) -> dict[str, Tensor]:
        """Compute y and the gradients of all operands in float64."""

        def formulas(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, **fused):
            activation = fused.pop("activation")
            operands = Operands(x, weight, bias, **fused)
            return reference.group_norm(operands, num_groups, eps, activation)

        return self.through(formulas, torch.float64)

    def through(self, group_norm: Callable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Compute the same by ``group_norm``, on the operands as they are or in ``dtype``."""
        operands = {
            name: t.detach().to(dtype or t.dtype).requires_grad_()
            for name, t in self.operands._asdict().items()
            if t is not None
        }
        fused = {name: t for name, t in operands.items() if name not in ("x", "weight", "bias")}
        if self.activation != "none" or dtype is not None:
            fused["activation"] = self.activation
        y = group_norm(
            operands["x"],
            self.num_groups,
            operands.get("weight"),
            operands.get("bias"),
            self.eps,
            **fused,
        )
        y.backward(self.dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{name}": t.grad for name, t in operands.items()}

    def through_kernels(self) -> dict[str, Tensor]:
        with triton_gn.backend("triton"):
            return self.through(triton_gn.group_norm)


def make_case(
    memory: GuardedMemory,
    device: str,
    shape: tuple[int, ...],
    num_groups: int,
    *,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    affine: tuple[bool, bool] = (True, True),
    mean: float = 0.0,
    std: float = 1.0,
    activation: str = "none",
    fused: tuple[str, ...] = (),
    per_sample: bool = True,
) -> Case:
    """Draw random operands between guard zones; weight is not 1, bias not 0.

    ``fused`` names those of scale, shift, pre_add and residual that are present; the first three
    are ``per_sample`` or shared.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.float64)

    def place(values: Tensor, dtype: torch.dtype) -> Tensor:
        return memory.guarded(values.to(device, dtype))

    x, dy, residual = draw(*shape) * std + mean, draw(*shape), draw(*shape)
    if channels_last:
        x, dy, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy, residual))
    channels = shape[1]
    rows = (shape[0], channels) if per_sample else (channels,)
    operands = {
        "weight": 1.5 + 0.5 * draw(channels) if affine[0] else None,
        "bias": draw(channels) if affine[1] else None,
    } | {name: residual if name == "residual" else draw(*rows) for name in fused}
    placed = {
        name: place(values, dtype if name == "residual" else param_dtype or dtype)
        for name, values in operands.items()
        if values is not None
    }
    return Case(place(x, dtype), place(dy, dtype), num_groups, **placed, activation=activation)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of ``dtype`` at each of the float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    return float((result.double() - expected).abs().max() / expected.abs().max())


def check(results: dict[str, Tensor], expected: dict[str, Tensor], dx_terms: float = 0.0) -> None:
    """Assert that each result is within the rounding errors of its arithmetic and its dtype.

    Arithmetic in float32 may be off by 1e-6 of the largest value for y, and twice that for
    gradients, whose sums have terms that cancel. A 16-bit dtype may add half an ulp, plus 0.01: a
    float32 result just beside a tie may round to either side. ``dx_terms`` is the largest term of
    dx, for cases in which all terms cancel.
    """
    float64 = next(iter(results.values())).dtype is torch.float64
    for name, value in expected.items():
        result = results[name]
        scale = value.abs().max()
        if name == "dx":
            scale = scale.clamp(min=dx_terms)
        if name == "dpre_add":  # sums of dx, whose terms cancel: in a group of one channel all do
            dx = expected["dx"].abs()
            scale = dx.reshape(*dx.shape[:2], -1).sum(-1).max()
        exact = float64 and result.dtype is torch.float64
        bound = (1e-14 if exact else 1e-6 if name == "y" else 2e-6) * scale
        if result.dtype.itemsize == 2:
            bound = bound + 0.51 * ulp(value, result.dtype)
        error = (result.double() - value).abs()
        assert (error <= bound).all(), f"{name}: {float((error / scale).max()):.2e} of the largest"


def check_poison_stays(
    poisoned: dict[str, Tensor], clean: dict[str, Tensor], touched: Tensor
) -> None:
    """Assert that NaN or Inf in x and dy stays in its group, the channels ``touched`` (N, C).

    y and dx of the group show it. No bit changes in y and dx of other groups, or in the
    parameters' gradients of other channels.
    """
    for name in ("y", "dx"):
        assert poisoned[name][touched].isnan().any()
        assert torch.equal(poisoned[name][~touched], clean[name][~touched])
    for name in ("dweight", "dbias"):
        untouched = ~touched.any(0)
        assert torch.equal(poisoned[name][untouched], clean[name][untouched])
