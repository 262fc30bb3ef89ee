"""Compiled kernels: their PTX, run on the CPU (tests/support/ptx.py), against float64."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.support.activations import ACTIVATIONS
from tests.support.ptx import Code, Fault, Kernel, Threads
from triton_gn.ops import launches, layout
from triton_gn.ops.launches import Launch
from triton_gn.plan import TARGETS, Config, plan
from triton_gn.tools import compile
from triton_gn.tools.verify import EPS, Verifier, errors_of, tolerance
from triton_gn.tools.workloads import FUSED, Workload

pytest.importorskip("triton", reason="device code")

CPU = torch.device("cpu")
STRATEGIES = ("resident", "split", "pipelined")
LAYOUTS = ("contiguous", "channels_last")


def run(launches: Iterable[Launch], target: str = "sm_90", **how: Any) -> Counter[tuple[int, str]]:
    """Run all programs of each launch, and return what they load and store.

    ``how`` are keywords of ``Kernel.run``.
    """
    traffic: Counter[tuple[int, str]] = Counter()
    for one in launches:
        kernel = Kernel(compile.assembly_of(one, target))
        arguments = (value for _, value in compile.arguments_in_code(one))
        traffic += kernel.run(one.grid, arguments, **how)
    return traffic


def check(
    workload: Workload,
    target: str = "sm_90",
    override: dict[str, Any] | None = None,
    most: float | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    **how: Any,
) -> list[Config]:
    """Run a forward, then a backward on its statistics: no more is lost than ``most`` or rounding
    explains, and tensors of x's size are loaded once for each pass and stored once.

    Returns:
        Their plans.
    """
    verifier = Verifier(workload, CPU)
    verifier.operands.x.mul_(std).add_(mean)
    stats = launches.statistics(verifier.operands.x, workload.n, workload.groups, 3).fill_(
        torch.nan
    )
    configs = []
    for direction in ("forward", "backward"):
        problem, given = (
            workload.problem(direction),
            workload.kernel_operands(verifier.operands, direction),
        )
        fields = tuple(sorted((override or {}).items()))
        config = plan(problem, TARGETS[target], override=fields)
        outputs = verifier.outputs(direction)
        for output in outputs.values():
            output.fill_(torch.nan)
        if direction == "forward":
            y = outputs["y"]
            described = launches.forward_launches(problem, config, given, y, stats, EPS)
        else:
            described = launches.backward_launches(
                problem, config, verifier.dy, given, stats, outputs
            )
        traffic = run(described, target, **how)
        for name, error in errors_of(outputs, verifier.expected(direction)).items():
            assert error <= (most or tolerance(outputs[name], given.x)), (direction, name)
        passes = 1 if config.strategy == "resident" else 2
        read = [given.x, given.residual, *[verifier.dy] * (direction == "backward")]
        for tensor in (one for one in read if one is not None):
            once = direction == "forward" and tensor is given.residual
            assert traffic[tensor.data_ptr(), "ld"] == (1 if once else passes) * tensor.nbytes
        for output in outputs.values():
            if output.shape == given.x.shape:
                assert traffic[output.data_ptr(), "st"] == output.nbytes
        configs.append(config)
    return configs


# 7x7 pixels span channels; groups of 5 channels lie side by side; samples of one pixel are rows
SHAPES: list[tuple[int, int, int, tuple[int, ...]]] = [
    (2, 12, 3, (8, 8)), (3, 16, 2, (7, 7)), (2, 20, 4, (9, 7)), (17, 24, 3, ()), (2, 6, 6, (5,)),
]  # fmt: skip
CASES = [
    (
        dtype,
        layout,
        strategy,
        SHAPES[i % 5],
        [*ACTIVATIONS][i % len(ACTIVATIONS)],
        FUSED if i % 3 else (),
    )
    for i, (layout, strategy, dtype) in enumerate(
        itertools.product(LAYOUTS, STRATEGIES, ("float16", "bfloat16", "float32", "float64"))
    )
]


@pytest.mark.parametrize(("dtype", "memory", "strategy", "shape", "activation", "fused"), CASES)
def test_answers(
    dtype: str,
    memory: str,
    strategy: str,
    shape: tuple[int, int, int, tuple[int, ...]],
    activation: str,
    fused: tuple[str, ...],
) -> None:
    n, channels, groups, spatial = shape
    workload = Workload(
        "", n, channels, groups, spatial, dtype, layout=memory, activation=activation, fused=fused
    )
    check(workload, override={"strategy": strategy})


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_100", "sm_120"])
@pytest.mark.parametrize("memory", LAYOUTS)
def test_answers_of_other_targets(memory: str, target: str) -> None:
    dtype = "float16" if target == "sm_75" else "bfloat16"
    check(Workload("", 2, 24, 3, (8, 8), dtype, layout=memory, activation="silu"), target)


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_pipelines_of_programs_beside_each_other(memory: str, seed: int) -> None:
    """A second pass waits for the first ones of its stage, whichever program runs next."""
    workload = Workload("", 2, 12, 3, (16, 20), layout=memory, activation="silu")
    override = {"strategy": "pipelined", "splits": 2, "pixel_tiles": 1, "persistent_programs": 5}
    check(workload, override=override, seed=seed, at_a_time=3)


@pytest.mark.parametrize("memory", LAYOUTS)
def test_moments(memory: str) -> None:
    """Statistics apart from apply: split's first launch, and one that merges its parts."""
    workload = Workload("", 2, 12, 3, (16, 20), "float32", layout=memory, fused=("pre_add",))
    operands = workload.operands(CPU)._replace(weight=None, bias=None)
    config = plan(workload.problem("forward"), TARGETS["sm_90"], override=(("strategy", "split"),))
    found = launches.statistics(operands.x, 4, 2, 3)
    run(
        launches.forward_launches(
            workload.problem("forward"), config, operands, None, None, 0.0, found
        )
    )
    assert operands.pre_add is not None
    x = (operands.x.double() + operands.pre_add.double()[:, :, None, None]).reshape(2, 3, -1)
    count, mean, mean_lo, m2 = found.double()
    assert torch.equal(count, torch.full((2, 3), 4.0 * 320, dtype=torch.float64))
    # the sums are float32's
    torch.testing.assert_close(mean + mean_lo, x.mean(2), rtol=0, atol=1e-7)
    torch.testing.assert_close(m2, x.var(2, correction=0) * 1280, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "mean", "most", "fuses"),
    [
        # ten times what float32 rounds; a mean without its low part costs 1e-3 and more
        ("float32", 1e4, 1e-6, False),
        ("float32", 1e4, 1e-6, True),
        ("float64", 1e8, 1e-10, False),  # the oracle, in float64 too, is 1e-11 off
    ],
)
@pytest.mark.parametrize(
    ("strategy", "memory", "fused"),
    [
        (strategy, memory, ("pre_add",) if (i + j) % 2 else ())
        for i, strategy in enumerate(STRATEGIES)
        for j, memory in enumerate(LAYOUTS)
    ],
)
def test_a_mean_far_from_0_keeps_its_low_part(
    strategy: str, memory: str, fused: tuple[str, ...], dtype: str, mean: float, most: float,
    fuses: bool,
) -> None:  # fmt: skip
    """Compilers put products into sums, unrounded, which the interpreter's arithmetic does not."""
    if dtype == "float64":
        fused = ()  # the oracle's sum with a pre_add would lose more
    workload = Workload("", 2, 12, 3, (16, 20), dtype, layout=memory, fused=fused)
    override = {"strategy": strategy} | ({} if strategy == "resident" else {"splits": 2})
    check(workload, override=override, most=most, mean=mean, std=0.1, fuses=fuses)


# what goes wrong is seen: otherwise the tests above could not fail


def simple() -> tuple[Launch, Tensor, Tensor]:
    """A forward of several warps, its x and its y."""
    workload = Workload("", 1, 4, 1, (32, 32), "float32")
    operands = workload.operands(CPU)._replace(weight=None, bias=None)
    problem = workload.problem("forward")
    config = plan(problem, TARGETS["sm_90"])
    assert config.num_warps > 1
    y = layout.empty_like(operands.x)
    (one,) = launches.forward_launches(problem, config, operands, y, None, EPS)
    return one, operands.x, y


@pytest.mark.parametrize("are_missing", [False, True])
def test_missing_barriers_show(are_missing: bool) -> None:
    """A missing barrier shows as NaN from unwritten shared memory, in some order of the warps."""
    one, x, y = simple()
    ptx = compile.assembly_of(one, "sm_90")
    if are_missing:
        ptx = ptx.replace("bar.sync", "bar.warp.sync")
    results = []
    for seed in range(4):
        Kernel(ptx).run(1, [value for _, value in compile.arguments_in_code(one)], seed)
        results.append(torch.allclose(y, layer_norm(x, x.shape[1:]), atol=1e-5))
    assert all(results) is not are_missing


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.flatten()[:-1].clone(), "leaves the 16380 bytes"),
        (lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:], "of 16 bytes is not aligned"),
    ],
    ids=["short", "askew"],
)
def test_wrong_accesses_show(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    one, x, _ = simple()
    arguments = [spoil(x) if v is x else v for _, v in compile.arguments_in_code(one)]
    with pytest.raises(Fault, match=message):
        Kernel(compile.assembly_of(one, "sm_90")).run(1, arguments)


def test_barriers_that_some_threads_never_reach_show() -> None:
    one, _, _ = simple()
    ptx = compile.assembly_of(one, "sm_90")
    leave = "mov.u32 %r0, %tid.x; setp.gt.s32 %p0, %r0, 31; @%p0 ret;"
    ptx = ptx.replace("bar.sync", f"{leave} bar.sync")
    with pytest.raises(Fault, match=r"some threads never come to bar\.sync"):
        Kernel(ptx).run(1, [value for _, value in compile.arguments_in_code(one)])


@pytest.mark.parametrize(("fuses", "left"), [(False, 0.0), (True, 2.0**-24)])
def test_fused_products_are_not_rounded(fuses: bool, left: float) -> None:
    """(1 + 2**-12)**2 is 1 + 2**-11 + 2**-24, of which float32 drops the last."""
    code = ".reg .b32 %r<4>; mul.f32 %r1, %r0, %r0; sub.f32 %r3, %r1, %r2;"
    threads = Threads(Code(code), 1)
    threads.fuses = fuses
    for name, value in (("%r0", 1 + 2.0**-12), ("%r2", 1 + 2.0**-11)):
        threads.registers[name] = np.array([value], np.float32).view(np.uint32)
    threads.run()
    assert threads.value("%r3", np.float32) == left
