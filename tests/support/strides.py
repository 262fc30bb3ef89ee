"""Calls whose operands lie in memory in every way that PyTorch knows, for property tests of both
paths."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import triton_gn
from tests.support.activations import ACTIVATIONS
from triton_gn import reference
from triton_gn.reference import Operands

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VIEWS = (
    "dense", "step", "offset", "transposed", "channels last", "expanded", "unbound", "odd",
    "negated",
)  # fmt: skip
# error allowed, relative to the largest value: some roundings, since PyTorch's path has several
TOLERANCES = dict(zip(DTYPES, (4e-3, 3e-2, 2e-5, 1e-12), strict=True))


class Problem(NamedTuple):
    """A call: how each operand lies in memory, by name, with its dtype."""

    shape: tuple[int, ...]
    num_groups: int
    activation: str
    rows: int  # of scale, shift and pre_add; 0 for (C,)
    views: dict[str, tuple[str, torch.dtype]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_groups, group_channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    n, spatial = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 5), max_size=3))
    # in groups of few elements gradients are what cancellation leaves over
    if group_channels * torch.Size(spatial).numel() < 8:
        spatial = [*spatial, 8]
    names = ["weight", "bias", "scale", "shift", "pre_add", "residual"]
    present = ["x", "dy", *draw(st.lists(st.sampled_from(names), unique=True))]
    main = draw(st.sampled_from(DTYPES))
    others = st.sampled_from((main, main, torch.float32))
    views = {
        name: (draw(st.sampled_from(VIEWS)), main if name in ("x", "dy") else draw(others))
        for name in present
    }
    return Problem(
        (n, num_groups * group_channels, *spatial),
        num_groups,
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.sampled_from((0, 1, n))),
        views,
    )


def lay(view: str, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Random numbers of that shape, in memory as ``view`` names it."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, dtype=torch.float64).to(dtype)

    if view == "step":
        return draw(*shape[:-1], 3 * shape[-1])[..., 1::3]
    if view == "offset":
        return draw(torch.Size(shape).numel() + 1)[1:].view(shape)
    if view == "transposed":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if view == "channels last" and len(shape) > 2:
        return draw(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if view == "expanded":
        return draw(*shape[:-1], 1).expand(shape)
    if view == "unbound":
        return draw(*shape, 2).unbind(-1)[1]
    if view == "odd":  # strides of sizes of 1 may be anything
        t = draw(*shape)
        strides = [s + 3 if n == 1 else s for n, s in zip(shape, t.stride(), strict=True)]
        return t.as_strided(shape, strides)
    return torch._neg_view(draw(*shape)) if view == "negated" else draw(*shape)


def operands_of(problem: Problem, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    channels = problem.shape[1]
    rows = (problem.rows, channels) if problem.rows else (channels,)
    shapes: dict[str, tuple[int, ...]] = {"weight": (channels,), "bias": (channels,)}
    shapes |= dict.fromkeys(("x", "dy", "residual"), problem.shape)
    return {
        name: lay(view, shapes.get(name, rows), dtype, random)
        for name, (view, dtype) in problem.views.items()
    }


def check(problem: Problem) -> None:
    """Two calls on different memory give y and all gradients of float64."""
    for seed in (0, 1):
        operands = operands_of(problem, seed)
        dy = operands.pop("dy")

        def ours(**named: Any) -> Tensor:
            x = named.pop("x")
            return triton_gn.group_norm(
                x, problem.num_groups, activation=problem.activation, **named
            )

        def formulas(**named: Any) -> Tensor:
            constants = problem.num_groups, 1e-5, problem.activation
            return reference.group_norm(Operands(**named), *constants)

        results = _step(ours, operands, dy)
        dense = {name: t.double().contiguous() for name, t in operands.items()}
        expected = _step(formulas, dense, dy.double().contiguous())
        dtypes = {t.dtype for t in (*operands.values(), dy)}
        tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
        # dpre_add is a sum of dx, whose terms cancel
        terms = float(expected["x"].abs().sum()) / problem.shape[0] / problem.shape[1]
        for name, value in expected.items():
            largest = max(1.0, float(value.abs().max()), terms if name == "pre_add" else 0.0)
            error = float((results[name].double() - value).abs().max())
            assert error <= tolerance * largest, (name, seed, error, largest)


def _step(run: Any, operands: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    y = run(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
