"""Print the errors of the Triton kernels and of PyTorch's group_norm against float64, as a table.

The kernels run on the GPU or, with TRITON_INTERPRET=1, in Triton's interpreter. PyTorch runs on the
same device.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import triton_gn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = 2
SHAPES = {"4,096": (2, 16, 16, 32), "262,144": (1, 8, 256, 256)}  # elements per group: shape
DISTRIBUTIONS = ((0.0, 1.0), (1e4, 0.1))  # mean, standard deviation


def step(
    group_norm: Callable[..., Tensor], operands: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return y, dx, dweight and dbias in float64."""
    x, weight, bias, dy = (tensor.to(dtype, copy=True) for tensor in operands)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = group_norm(x, GROUPS, weight, bias)
    return [t.double() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))]


def main() -> None:
    """Print one row per shape, format and distribution."""
    torch.manual_seed(0)
    names = ("y", "dx", "dweight", "dbias")
    print(f"| group, format, mean ± std | {' | '.join(names)} |")
    print("| --- " * 5 + "|")
    for (size, shape), channels_last, (mean, std) in (
        (shape, channels_last, distribution)
        for shape in SHAPES.items()
        for channels_last in (False, True)
        for distribution in DISTRIBUTIONS
    ):
        x = (torch.randn(shape, dtype=torch.float64) * std + mean).float()
        dy, weight, bias = torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
        operands = [tensor.to(DEVICE) for tensor in (x, weight, bias, dy)]
        # contiguous: PyTorch's channels-last CPU kernel loses digits to cancellation in float64 too
        exact = step(F.group_norm, [t.contiguous() for t in operands], torch.float64)
        theirs = step(F.group_norm, operands, torch.float32)
        with triton_gn.backend("triton"):
            ours = step(triton_gn.group_norm, operands, torch.float32)
        cells = []
        for expected, *results in zip(exact, ours, theirs, strict=True):
            scale = expected.abs().max()
            errors = [float((result - expected).abs().max() / scale) for result in results]
            cells.append(f"{errors[0]:.0e} ({errors[1]:.0e})")
        kind = "channels-last" if channels_last else "contiguous"
        print(f"| {size}, {kind}, {mean:g} ± {std:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
