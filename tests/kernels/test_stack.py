"""Samples of one pixel, of which a program takes several: each row is another sample's group."""

import os

import pytest
import torch

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import Case, check, check_poison_stays, make_case
from triton_gn.plan import Tile

FUSED = ("scale", "shift", "pre_add", "residual")


def tile_of(case: Case, direction: str) -> Tile:
    """Return the tile of a program."""
    return triton_gn.explain(
        case.x, case.num_groups, direction=direction, activation=case.activation,
        pre_add=case.pre_add is not None, residual=case.residual is not None,
    ).config.tile  # fmt: skip


@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("fused", [(), FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("channels", "num_groups", "dtype"),
    [(64, 4, torch.float32), (30, 3, torch.bfloat16), (1500, 1, torch.float16)],
    ids=str,
)
def test_matches_float64(
    memory: GuardedMemory,
    device: str,
    channels: int,
    num_groups: int,
    dtype: torch.dtype,
    fused: tuple[str, ...],
    n: int,
) -> None:
    case = make_case(
        memory, device, (n, channels), num_groups, dtype=dtype, activation="silu" * bool(fused)
        or "none", fused=fused, per_sample=False, mean=3.0,
    )  # fmt: skip
    assert tile_of(case, "forward").batch_rows
    assert tile_of(case, "backward").batch_rows
    check(case.through_kernels(), case.expected())


def test_values_per_sample_keep_samples_apart(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (9, 24), 3, activation="silu", fused=FUSED)
    check(case.through_kernels(), case.expected())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's word for inf - inf
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_sample(memory: GuardedMemory, device: str, poison: float) -> None:
    case = make_case(memory, device, (13, 24), 3)
    clean = case.through_kernels()
    case.x[5, 9] = poison  # group 1: channels 8 to 15
    case.dy[5, 9] = poison
    poisoned = case.through_kernels()
    touched = torch.zeros(13, 24, dtype=torch.bool)
    touched[5, 8:16] = True
    check_poison_stays(poisoned, clean, touched)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_without_a_sample_add_nothing(memory: GuardedMemory, device: str) -> None:
    """Even where z is infinite."""
    case = make_case(memory, device, (5, 16), 2, activation="sigmoid")
    case.bias[3] = float("inf")
    assert tile_of(case, "backward").rows > 5
    expected = case.expected()["dbias"]
    assert expected.isfinite().all()
    # sums of five float32 terms: a few roundings
    assert torch.allclose(case.through_kernels()["dbias"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_sample_has_the_same_bits_alone(memory: GuardedMemory, device: str) -> None:
    case = make_case(memory, device, (6, 48), 3)
    with triton_gn.batch_invariant(True):
        batch = case.through_kernels()
        case.x, case.dy = case.x[2:3], case.dy[2:3]
        alone = case.through_kernels()
    assert torch.equal(alone["y"], batch["y"][2:3])
    assert torch.equal(alone["dx"], batch["dx"][2:3])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
def test_weight_and_bias_are_read_once_a_stack(memory: GuardedMemory, device: str) -> None:
    from tests.support.interpreter import Traffic

    case = make_case(memory, device, (100, 64), 4)
    x, weight, bias = case.x.requires_grad_(), case.weight.requires_grad_(), case.bias
    with triton_gn.backend("triton"):
        with Traffic(x=x, weight=weight, bias=bias) as forward:
            y = triton_gn.group_norm(x, 4, weight, bias)
        with Traffic(x=x, dy=case.dy) as backward:
            torch.autograd.grad(y, [x, weight], case.dy)
    programs = -(-100 // tile_of(case, "forward").rows)
    assert programs < 20
    assert forward.loaded["x"] == backward.loaded["x"] == backward.loaded["dy"] == x.nbytes
    assert forward.loaded["weight"] == forward.loaded["bias"] == programs * weight.nbytes
    programs = -(-100 // tile_of(case, "backward").rows)
    partials = weight.nbytes * programs if programs > 1 else 0
    assert backward.stored["other"] == x.nbytes + weight.nbytes + partials
