"""Every activation of the table at chosen z, where a formula may have a kink or cancel."""

import pytest
import torch

import triton_gn
from tests.support.activations import ACTIVATIONS

# z is the residual where weight and bias are 0
EDGES = torch.tensor([-3.0, 3.0, 6.0, -0.25, 0.25, 20.0])
FINITE = torch.cat(
    [
        torch.arange(-8.0, 9.0),
        torch.tensor([-0.0, 1e-6, -1e-6, 1e-3, -1e-3, -0.01, 0.1, -0.1, 30.0, -30.0]),
        *(torch.nextafter(EDGES, EDGES + side) for side in (-1, 1)),
        EDGES,
    ]
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_derivatives_match_pytorch(
    device: str, activation: str, dtype: torch.dtype
) -> None:
    z = FINITE.to(device, dtype).requires_grad_()
    x = torch.randn(1, 1, len(z), dtype=dtype, device=device)
    zero = torch.zeros(1, dtype=dtype, device=device)
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(
            x, 1, zero, zero, activation=activation, residual=z.reshape(x.shape)
        )
    dy = torch.linspace(0.5, 2, len(z), dtype=dtype, device=device)
    (dz,) = torch.autograd.grad(y, z, dy.reshape(y.shape))
    exact = z.detach().double().requires_grad_()
    expected = ACTIVATIONS[activation](exact)
    (expected_dz,) = torch.autograd.grad(expected, exact, dy.double())
    rtol, atol = (1e-6, 5e-7) if dtype is torch.float32 else (1e-14, 1e-15)
    for result, reference in ((y.flatten(), expected), (dz, expected_dz)):
        torch.testing.assert_close(result.double(), reference.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(device: str, activation: str) -> None:
    x, zero = torch.randn(1, 1, 8, device=device), torch.zeros(1, device=device)
    residual = torch.tensor([0.0, torch.nan, 1, -1, 7, torch.nan, -7, 2], device=device)
    with triton_gn.backend("triton"):
        y = triton_gn.group_norm(
            x, 1, zero, zero, activation=activation, residual=residual.reshape(x.shape)
        )
    assert torch.equal(y.flatten().isnan(), residual.isnan())
