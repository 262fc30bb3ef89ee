"""One GroupNorm step through the kernels beside float64, and how far they are apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

import triton_gn
from tests.kernels.memory import GuardedMemory
from triton_gn import reference


@dataclass
class Case:
    """Operands of one step; ``expected`` are y, dx, dweight and dbias in float64."""

    x: Tensor
    dy: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5

    def expected(self) -> dict[str, Tensor]:
        x, dy = self.x.double(), self.dy.double()
        weight = None if self.weight is None else self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        y = reference.group_norm(x, self.num_groups, weight, bias, self.eps)
        grads = reference.group_norm_backward(dy, x, self.num_groups, weight, self.eps)
        return self._present(y, *grads)

    def through(self, group_norm: object) -> dict[str, Tensor]:
        """y and the gradients that ``group_norm`` gives."""
        x, weight, bias = (
            None if t is None else t.detach().requires_grad_()
            for t in (self.x, self.weight, self.bias)
        )
        y = group_norm(x, self.num_groups, weight, bias, self.eps)
        y.backward(self.dy)
        grads = (None if t is None else t.grad for t in (x, weight, bias))
        return self._present(y.detach(), *grads)

    def through_kernels(self) -> dict[str, Tensor]:
        with triton_gn.backend("triton"):
            return self.through(triton_gn.group_norm)

    def _present(self, y: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor) -> dict[str, Tensor]:
        results = {"y": y, "dx": dx}
        if self.weight is not None:
            results["dweight"] = dweight
        if self.bias is not None:
            results["dbias"] = dbias
        return results


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
) -> Case:
    """Random operands between guard zones; weight is not 1, bias not 0."""
    random = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.float64)

    def place(values: Tensor, dtype: torch.dtype) -> Tensor:
        return memory.guarded(values.to(device, dtype))

    x, dy = draw(*shape) * std + mean, draw(*shape)
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    parameters = (1.5 + 0.5 * draw(shape[1]), draw(shape[1]))
    weight, bias = (
        place(values, param_dtype or dtype) if there else None
        for values, there in zip(parameters, affine, strict=True)
    )
    return Case(place(x, dtype), place(dy, dtype), num_groups, weight, bias)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of ``dtype`` at each of the float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    return float((result.double() - expected).abs().max() / expected.abs().max())


def check(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each result within its rounding: of float32 arithmetic (float64's own for float64 input),
    relative to the largest value, plus half an ulp of its own dtype where that has 16 bits.

    1e-6 for y, twice that for gradients: sums whose terms cancel. 0.51: the last rounding is half
    an ulp, and a float32 result just beside a tie of a 16-bit dtype may fall to either side.
    """
    float64 = next(iter(results.values())).dtype is torch.float64
    for name, value in expected.items():
        result = results[name]
        scale = value.abs().max()
        exact = float64 and result.dtype is torch.float64
        bound = (1e-14 if exact else 1e-6 if name == "y" else 2e-6) * scale
        if result.dtype.itemsize == 2:
            bound = bound + 0.51 * ulp(value, result.dtype)
        error = (result.double() - value).abs()
        assert (error <= bound).all(), f"{name}: {float((error / scale).max()):.2e} of the largest"
