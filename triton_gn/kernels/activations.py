"""Elementary functions, and the rows of ``triton_gn.activations`` as device functions.

``NVIDIA`` says that the kernel is compiled for such a GPU: there exp2 and the reciprocal are one
instruction each, within 2 ulp, where Triton's own take several. docs/math.md has the formulas.
"""

import functools
from types import FunctionType
from typing import NamedTuple

import triton
import triton.language as tl

from triton_gn.activations import lookup

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(z, NVIDIA: tl.constexpr):
    if NVIDIA and z.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [z * _LOG2_E], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(z)


@triton.jit
def reciprocal(z, NVIDIA: tl.constexpr):
    if NVIDIA and z.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [z], tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / z


@triton.jit
def sigmoid(z, NVIDIA: tl.constexpr):
    return reciprocal(1.0 + exp(-z, NVIDIA), NVIDIA)


@triton.jit
def normal_cdf(z, NVIDIA: tl.constexpr):
    """Return the cumulative normal distribution at z, and exp(-z^2 / 2)."""
    e = exp(z * z * -0.5, NVIDIA)
    if z.dtype == tl.float64:
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476), e
    else:
        # half the instructions of erf, and a tail that does not cancel
        t = reciprocal(1.0 + tl.abs(z) * 0.29, NVIDIA)
        s = 0.036831271710132625 * t - 0.1802816009202154
        s = (s * t + 0.27936977619430214) * t - 0.11975520522142305
        s = (s * t + 0.16351701297354865) * t + 0.08637094015914033
        s = (s * t + 0.1184121259066524) * t + 0.1155356719541039
        tail = s * t * e
        return tl.where(z < 0, tail, 1.0 - tail), e


class DeviceFunctions(NamedTuple):
    """Device functions of an activation: y of (z, NVIDIA), dz of (dy, z, NVIDIA)."""

    forward: triton.runtime.JITFunction | None
    gradient: triton.runtime.JITFunction | None


def _compiled(function, arguments):
    """Make a device function of a row's, whose globals are this file's names and the arguments."""
    constants = {name: tl.constexpr(value) for name, value in arguments.items()}
    return function and triton.jit(FunctionType(function.__code__, globals() | constants))


@functools.cache
def device_functions(name: str) -> DeviceFunctions:
    """Return what kernels take as the constexpr ACTIVATION, (None, None) for "none".

    Triton's compile cache is keyed by the source of such an argument and the constants it reads.
    """
    row, arguments = lookup(name)
    return DeviceFunctions(_compiled(row.forward, arguments), _compiled(row.gradient, arguments))
