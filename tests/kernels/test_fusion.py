"""What is fused around the norm: every activation, scale, shift, pre_add and residual, against
float64, with all gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import triton_gn
from tests.support.activations import ACTIVATIONS
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case, relative_error
from triton_gn.reference import Operands

STRATEGIES = ("resident", "pipelined", "split")
EACH_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES)
FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
ALL = ("scale", "shift", "pre_add", "residual")
FUSED = [
    (*scale_shift, *pre_add, *residual)
    for scale_shift in ((), ("scale", "shift"), ("scale",), ("shift",))
    for pre_add in ((), ("pre_add",))
    for residual in ((), ("residual",))
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SHAPES = ((2, 12, 8, 8), (3, 10, 7, 7), (1, 12, 5, 3, 2), (2, 6, 9))

# every activation x what is fused x format, while dtypes, shapes and strategies go round
CASES = [
    (*factors, DTYPES[i % 4], SHAPES[i // 4 % 4], STRATEGIES[i // 3 % 3])
    for i, factors in enumerate(itertools.product(ACTIVATIONS, FUSED, (False, True)))
]


def transposed(x: Tensor, channels_last: bool) -> Tensor:
    """Return x in the other memory format."""
    return x.contiguous() if channels_last else x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(
    ("activation", "fused", "channels_last", "dtype", "shape", "strategy"),
    CASES,
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", ""),
)
def test_matches_float64(
    memory: GuardedMemory,
    device: str,
    activation: str,
    fused: tuple[str, ...],
    channels_last: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strategy: str,
) -> None:
    case = make_case(
        memory,
        device,
        shape,
        2,
        channels_last=channels_last,
        dtype=dtype,
        activation=activation,
        fused=fused,
        per_sample=len(fused) % 2 == 0,
    )
    case.dy = transposed(case.dy, channels_last)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())
    assert results["y"].stride() == results["dx"].stride() == case.x.stride()


@EACH_STRATEGY
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("name", Operands._fields)
def test_each_gradient_alone(
    memory: GuardedMemory, device: str, name: str, activation: str, strategy: str
) -> None:
    case = make_case(memory, device, (2, 6, 5, 3), 3, activation=activation, fused=ALL)
    expected = case.expected()
    operand = getattr(case, name).requires_grad_()
    with triton_gn.plan_override(strategy=strategy), triton_gn.backend("triton"):
        y = triton_gn.group_norm(
            case.x, 3, case.weight, case.bias, activation=activation, scale=case.scale,
            shift=case.shift, pre_add=case.pre_add, residual=case.residual,
        )  # fmt: skip
    assert y.requires_grad
    y.backward(case.dy)
    others = [t for t in case.operands if t is not None and t is not operand]
    assert all(t.grad is None for t in others)
    check(expected | {f"d{name}": operand.grad}, expected)


@EACH_STRATEGY
@FORMATS
def test_mixed_dtypes_and_strided_rows(
    memory: GuardedMemory, device: str, channels_last: bool, strategy: str
) -> None:
    """Scale and shift are halves of one tensor (torch.chunk), and every dtype occurs at once."""
    case = make_case(
        memory, device, (3, 8, 5, 4), 2, channels_last=channels_last, dtype=torch.bfloat16,
        activation="silu", fused=ALL,
    )  # fmt: skip
    both = torch.cat([case.scale, case.shift], 1).half()
    case.scale, case.shift = both.chunk(2, dim=1)
    case.weight, case.bias = case.weight.double(), case.bias.float()
    case.pre_add = case.pre_add[:1].expand(3, -1).double()
    case.residual = transposed(case.residual.float(), channels_last)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    check(results, case.expected())
    for name, operand in case.operands._asdict().items():
        assert results[f"d{name}"].dtype is operand.dtype, name
        assert results[f"d{name}"].shape == operand.shape, name


def unfused(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, **fused: Tensor
) -> Tensor:
    """Compute the same with PyTorch's operations, each of which rounds to the dtype."""

    def rows(values: Tensor) -> Tensor:
        return values.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))

    if "pre_add" in fused:
        x = x + rows(fused["pre_add"])
    n = F.group_norm(x, num_groups, weight, bias, eps)
    n = n * (1 + rows(fused["scale"])) + rows(fused["shift"])
    return ACTIVATIONS[fused["activation"]](n + fused["residual"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "mish", "tanh"])
@EACH_STRATEGY
def test_as_exact_as_the_unfused_sequence(
    memory: GuardedMemory, device: str, strategy: str, activation: str, dtype: torch.dtype
) -> None:
    case = make_case(
        memory, device, (2, 8, 12, 12), 2, dtype=dtype, activation=activation, fused=ALL
    )
    expected = case.expected()
    with triton_gn.plan_override(strategy=strategy):
        ours = case.through_kernels()
    theirs = case.through(unfused)
    errors = {
        name: (relative_error(ours[name], value), relative_error(theirs[name], value))
        for name, value in expected.items()
    }
    if dtype is torch.float32:  # both are a few roundings off, in each tensor by chance
        assert all(mine <= 2 * other + 5e-7 for mine, other in errors.values()), errors
    else:
        assert all(mine <= other for mine, other in errors.values()), errors


@EACH_STRATEGY
@FORMATS
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (2, 8, 7, 7)])
def test_pre_add_far_from_zero(
    memory: GuardedMemory, device: str, shape: tuple[int, ...], channels_last: bool, strategy: str
) -> None:
    """x + pre_add is never rounded: at a mean of 1e4 that alone would cost 6e-3."""
    case = make_case(
        memory, device, shape, 2, channels_last=channels_last, mean=1e4, std=0.1,
        activation="silu", fused=("pre_add",),
    )  # fmt: skip
    case.pre_add.mul_(0.1).sub_(5e3)
    with triton_gn.plan_override(strategy=strategy):
        results = case.through_kernels()
    expected = case.expected()
    assert relative_error(results["y"], expected["y"]) <= 1e-6
    assert relative_error(results["dx"], expected["dx"]) <= 2e-6
    assert relative_error(results["dweight"], expected["dweight"]) <= 2e-6


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # of z**3 in gelu_tanh
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(
    memory: GuardedMemory, device: str, activation: str
) -> None:
    """z and dz at once, from far below to far above and close to 0, value by value: with a scale of
    -1 nothing is left of the norm but the residual."""
    z = torch.cat([torch.linspace(-120, 120, 97), torch.logspace(-30, 0, 31), torch.tensor([1e15])])
    z = torch.cat([z, -z]).reshape(1, 2, -1)
    case = make_case(
        memory, device, tuple(z.shape), 1, activation=activation, affine=(False, False)
    )
    case.scale = torch.full((2,), -1.0, device=device)
    case.residual, case.dy = z.to(device), torch.ones_like(case.dy)
    results, expected = case.through_kernels(), case.expected()
    for name in ("y", "dresidual"):
        result, value = results[name].double(), expected[name]
        assert ((result - value).abs() <= 1e-6 * value.abs().clamp(min=1.0)).all(), name
    small = z.abs() < 1
    error = (results["y"] - expected["y"]).abs()[small]
    assert (error <= 1e-6 * expected["y"].abs()[small]).all()


def test_gelu_keeps_its_digits_far_below_0(memory: GuardedMemory, device: str) -> None:
    """1 + erf cancels there: PyTorch's float32 has no correct digit at -5.6."""
    z = torch.linspace(-9, 0, 200).reshape(1, 2, -1)
    case = make_case(memory, device, tuple(z.shape), 1, activation="gelu", affine=(False, False))
    case.scale = torch.full((2,), -1.0, device=device)
    case.residual = z.to(device)
    computed = case.through_kernels()["y"].cpu().double()
    z = z.double()
    expected = z * torch.special.erfc(-z * 0.5**0.5) / 2
    # z * z is rounded before its exponential is taken
    assert ((computed - expected).abs() <= (5e-7 + 1.5e-7 * z * z) * expected.abs()).all()


@FORMATS
@EACH_STRATEGY
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word for inf - inf
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_group(
    memory: GuardedMemory, device: str, strategy: str, channels_last: bool, poison: float
) -> None:
    # a group to a program, or (innermost) four
    case = make_case(
        memory, device, (2, 12, 9, 7), 4, channels_last=channels_last, activation="mish", fused=ALL
    )
    with triton_gn.plan_override(strategy=strategy):
        clean = case.through_kernels()
        case.x[1, 4, 3, 2] = poison  # sample 1, group 1: channels 3 to 5
        poisoned = case.through_kernels()
    touched = torch.zeros(2, 12, dtype=torch.bool)
    touched[1, 3:6] = True
    for name in ("y", "dx", "dresidual", "dscale", "dpre_add"):
        assert poisoned[name][touched].isnan().any(), name
        assert torch.equal(poisoned[name][~touched], clean[name][~touched]), name
    for name in ("dweight", "dbias"):
        assert torch.equal(poisoned[name][~touched.any(0)], clean[name][~touched.any(0)]), name


@EACH_STRATEGY
def test_bits_do_not_depend_on_run_or_batch(
    memory: GuardedMemory, device: str, strategy: str
) -> None:
    case = make_case(memory, device, (4, 12, 8, 8), 4, activation="gelu", fused=ALL)
    with triton_gn.batch_invariant(True), triton_gn.plan_override(strategy=strategy):
        batch, again = case.through_kernels(), case.through_kernels()
        for name, value in batch.items():
            assert torch.equal(value, again[name]), name
        for name in ("x", "dy", "scale", "shift", "pre_add", "residual"):
            setattr(case, name, getattr(case, name)[2:3])
        alone = case.through_kernels()
    for name in ("y", "dx", "dresidual", "dscale", "dshift", "dpre_add"):
        assert torch.equal(alone[name], batch[name][2:3]), name


def test_y_is_the_same_with_and_without_a_gradient_to_record(
    memory: GuardedMemory, device: str
) -> None:
    case = make_case(memory, device, (2, 6, 5, 3), 3, activation="silu", fused=ALL)
    fused = {name: getattr(case, name) for name in ALL}
    with triton_gn.backend("triton"), torch.no_grad():
        y = triton_gn.group_norm(case.x, 3, case.weight, case.bias, activation="silu", **fused)
    assert torch.equal(y, case.through_kernels()["y"])


@EACH_STRATEGY
@pytest.mark.parametrize("n", [1, 3])
def test_who_shares_an_operand_shares_its_gradient(
    memory: GuardedMemory, device: str, n: int, strategy: str
) -> None:
    """(C,) and (1, C) get the sum of what the rows of (N, C) get."""
    case = make_case(memory, device, (n, 6, 5, 3), 3, activation="silu", fused=ALL)
    names = ("scale", "shift", "pre_add")
    row = {name: getattr(case, name)[:1] for name in names}
    forms = {
        "rows": {name: t.expand(n, -1) for name, t in row.items()},
        "row": row,
        "values": {name: t[0] for name, t in row.items()},
    }
    with triton_gn.plan_override(strategy=strategy):
        computed = {
            form: replace(case, **operands).through_kernels() for form, operands in forms.items()
        }
    for name in names:
        expected = computed["rows"][f"d{name}"].sum(0)
        for form in ("row", "values"):
            grad = computed[form][f"d{name}"]
            assert grad.shape == forms[form][name].shape
            # sums of 15 values a sample, in another order: some roundings of the largest
            torch.testing.assert_close(grad.reshape(6), expected, rtol=1e-5, atol=1e-5)
