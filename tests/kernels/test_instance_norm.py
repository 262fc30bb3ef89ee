"""InstanceNorm layers through the kernels, against the formulas in float64."""

import torch
from torch import nn

import triton_gn
from tests.support.memory import GuardedMemory
from tests.support.oracle import check, make_case
from tests.support.pairs import each_pair


@each_pair(
    "rank affine channels_last dtype batched activation",
    (1, 2, 3),
    (True, False),
    (False, True),
    (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    (True, False),
    ("none", "silu"),
)
def test_matches_float64(
    memory: GuardedMemory,
    device: str,
    rank: int,
    affine: bool,
    channels_last: bool,
    dtype: torch.dtype,
    batched: bool,
    activation: str,
) -> None:
    case = make_case(
        memory,
        device,
        (2 if batched else 1, 6, *(5, 4, 3)[:rank]),
        6,
        channels_last=channels_last,
        dtype=dtype,
        affine=(affine, affine),
        activation=activation,
    )
    kind = getattr(triton_gn, f"InstanceNorm{rank}d")
    layer = kind(6, affine=affine, activation=activation, device=device, dtype=dtype)
    if affine:
        layer.weight, layer.bias = nn.Parameter(case.weight), nn.Parameter(case.bias)
    x = case.x.requires_grad_()
    with triton_gn.backend("triton"):
        y = layer(x) if batched else layer(x[0])
        y.backward(case.dy if batched else case.dy[0])
    results = {"y": y.detach().reshape(x.shape), "dx": x.grad}
    results |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    check(results, case.expected())
    assert y.stride() == (x.stride() if batched else x[0].stride())
