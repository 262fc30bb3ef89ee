"""The table of activations. A new activation is one row here and one line in docs/math.md.

``forward`` and ``gradient`` are device code. kernels/activations.py compiles them with its own
names as their globals, so that importing this file does not import Triton. They may call what that
file defines, read the row's arguments by name, and read no other globals. ``NVIDIA`` tells whether
the GPU is NVIDIA's.

An activation is named by a string everywhere: in a call, a layer, an operator, a plan and a file.
A row with a ``parameter`` takes another value of it in parentheses: "leaky_relu(0.2)".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

    from triton_gn.kernels.activations import exp, normal_cdf, reciprocal, sigmoid

    negative_slope = alpha = tl.constexpr(0.0)


@dataclass(frozen=True)
class Activation:
    """One activation y of z.

    PyTorch's own is ``torch.nn.functional.<function>(z, **arguments)``, and as a layer a
    ``torch.nn.<module>`` whose attributes equal ``arguments``.
    """

    forward: Callable[..., Any] | None  # y of (z, NVIDIA)
    gradient: Callable[..., Any] | None  # dz of (dy, z, NVIDIA)
    # instructions of a thread per element, forward and backward, counted in the code for sm_90
    # (docs/measured.md)
    cost: tuple[int, int]
    function: str | None
    module: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parameter: str | None = None  # the argument that a name may give in parentheses


def _relu(z, NVIDIA: tl.constexpr):
    return tl.where(z < 0, 0.0, z)  # a NaN stays a NaN


def _relu_gradient(dy, z, NVIDIA: tl.constexpr):
    return tl.where(z <= 0, 0.0, dy)


def _leaky_relu(z, NVIDIA: tl.constexpr):
    return tl.where(z < 0, z * negative_slope, z)


def _leaky_relu_gradient(dy, z, NVIDIA: tl.constexpr):
    return tl.where(z > 0, dy, dy * negative_slope)


def _silu(z, NVIDIA: tl.constexpr):
    return z * sigmoid(z, NVIDIA)


def _silu_gradient(dy, z, NVIDIA: tl.constexpr):
    s = sigmoid(z, NVIDIA)
    return dy * (s * (1.0 + z * (1.0 - s)))


def _gelu(z, NVIDIA: tl.constexpr):
    cdf, _ = normal_cdf(z, NVIDIA)
    return z * cdf


def _gelu_gradient(dy, z, NVIDIA: tl.constexpr):
    cdf, e = normal_cdf(z, NVIDIA)
    return dy * (cdf + z * (e * 0.3989422804014327))  # 1 / sqrt(2 pi)


def _gelu_tanh(z, NVIDIA: tl.constexpr):
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel; the factor is 2 * sqrt(2 / pi)
    return z * sigmoid((z + z * z * z * 0.044715) * 1.5957691216057308, NVIDIA)


def _gelu_tanh_gradient(dy, z, NVIDIA: tl.constexpr):
    q = (z + z * z * z * 0.044715) * 1.5957691216057308
    slope = (z * z * (3.0 * 0.044715) + 1.0) * 1.5957691216057308
    # s * (1 - s) is e * r * r, where 1 - s would lose digits that z * slope makes matter
    e = exp(-tl.abs(q), NVIDIA)
    r = reciprocal(1.0 + e, NVIDIA)
    s = tl.where(q < 0, e * r, r)
    return dy * (s + e * r * r * slope * z)


def _mish(z, NVIDIA: tl.constexpr):
    # tanh(softplus(20)) is 1, in float64 too
    e = exp(tl.where(z > 20.0, 20.0, z), NVIDIA)
    numerator = e * (e + 2.0)
    return z * (numerator * reciprocal(numerator + 2.0, NVIDIA))


def _mish_gradient(dy, z, NVIDIA: tl.constexpr):
    z = tl.where(z > 20.0, 20.0, z)
    e = exp(z, NVIDIA)
    numerator = e * (e + 2.0)
    r = reciprocal(numerator + 2.0, NVIDIA)
    return dy * (numerator * r + z * (4.0 * r) * (e * (1.0 + e) * r))


def _sigmoid(z, NVIDIA: tl.constexpr):
    return sigmoid(z, NVIDIA)


def _sigmoid_gradient(dy, z, NVIDIA: tl.constexpr):
    s = sigmoid(z, NVIDIA)
    return dy * (s * (1.0 - s))


def _tanh(z, NVIDIA: tl.constexpr):
    # near 0, 1 - 2 / (1 + exp(2 z)) cancels: there Taylor's series, to the precision of the dtype
    q = z * z
    if z.dtype == tl.float64:
        s = 9.691537956929451e-05 * q - 0.00023912911424355248
        s = (s * q + 0.000590027440945586) * q - 0.0014558343870513183
        s = (s * q + 0.003592128036572481) * q - 0.008863235529902197
    else:
        s = -0.008863235529902197
    s = (s * q + 0.021869488536155203) * q - 0.05396825396825397
    s = (s * q + 0.13333333333333333) * q - 0.3333333333333333
    series = z + z * q * s
    return tl.where(tl.abs(z) < 0.25, series, 1.0 - 2.0 * sigmoid(-2.0 * z, NVIDIA))


def _tanh_gradient(dy, z, NVIDIA: tl.constexpr):
    s = sigmoid(2.0 * z, NVIDIA)
    return dy * (4.0 * s * (1.0 - s))


def _hardswish(z, NVIDIA: tl.constexpr):
    t = z + 3.0
    t = tl.where(t < 0, 0.0, t)
    return z * (tl.where(t > 6, 6.0, t) * (1.0 / 6.0))


def _hardswish_gradient(dy, z, NVIDIA: tl.constexpr):
    dz = tl.where(z < 3, dy * (z * (1.0 / 3.0) + 0.5), dy)
    return tl.where(z <= -3, 0.0, dz)


def _relu6(z, NVIDIA: tl.constexpr):
    return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))


def _relu6_gradient(dy, z, NVIDIA: tl.constexpr):
    return tl.where((z <= 0) | (z >= 6), 0.0, dy)


def _elu(z, NVIDIA: tl.constexpr):
    # near 0, exp(z) - 1 cancels: there Taylor's series, to the precision of the dtype
    if z.dtype == tl.float64:
        s = 1.6059043836821613e-10 * z + 2.08767569878681e-09
        s = (
            (s * z + 2.505210838544172e-08) * z + 2.755731922398589e-07
        ) * z + 2.7557319223985893e-06
        s = ((s * z + 2.48015873015873e-05) * z + 0.0001984126984126984) * z + 0.001388888888888889
    else:
        s = 0.001388888888888889
    s = ((s * z + 0.008333333333333333) * z + 0.041666666666666664) * z + 0.16666666666666666
    series = z + z * z * (s * z + 0.5)
    return tl.where(z > 0, z, tl.where(z > -0.25, series, exp(z, NVIDIA) - 1.0) * alpha)


def _elu_gradient(dy, z, NVIDIA: tl.constexpr):
    return tl.where(z <= 0, dy * (exp(z, NVIDIA) * alpha), dy)


TABLE = {
    "none": Activation(None, None, (0, 0), None, None),
    "relu": Activation(_relu, _relu_gradient, (2, 3), "relu", "ReLU"),
    "leaky_relu": Activation(
        _leaky_relu, _leaky_relu_gradient, (2, 3), "leaky_relu", "LeakyReLU",
        {"negative_slope": 0.01}, "negative_slope",
    ),
    "silu": Activation(_silu, _silu_gradient, (5, 9), "silu", "SiLU"),
    "gelu": Activation(_gelu, _gelu_gradient, (18, 21), "gelu", "GELU", {"approximate": "none"}),
    "gelu_tanh": Activation(
        _gelu_tanh, _gelu_tanh_gradient, (9, 18), "gelu", "GELU", {"approximate": "tanh"}
    ),
    "mish": Activation(_mish, _mish_gradient, (9, 16), "mish", "Mish"),
    "sigmoid": Activation(_sigmoid, _sigmoid_gradient, (4, 8), "sigmoid", "Sigmoid"),
    "tanh": Activation(_tanh, _tanh_gradient, (14, 10), "tanh", "Tanh"),
    "hardswish": Activation(
        _hardswish, _hardswish_gradient, (6, 6), "hardswish", "Hardswish"
    ),
    "relu6": Activation(_relu6, _relu6_gradient, (3, 5), "relu6", "ReLU6"),
    "elu": Activation(_elu, _elu_gradient, (12, 5), "elu", "ELU", {"alpha": 1.0}, "alpha"),
}  # fmt: skip

# as errors and help texts list the names
NAMES = ", ".join(
    name + (f"({row.parameter})" if row.parameter else "") for name, row in TABLE.items()
)


def lookup(name: str) -> tuple[Activation, Mapping[str, Any]] | None:
    """Return the row and the arguments that a name stands for, None if there is no such name."""
    row = TABLE.get(name)  # torch.compile traces this function
    if row is not None:
        return row, row.arguments
    base, parenthesis, number = name.partition("(")
    row = TABLE.get(base)
    if row is None or row.parameter is None or not parenthesis or not number.endswith(")"):
        return None
    try:
        value = float(number[:-1])
    except ValueError:
        return None
    return (row, {row.parameter: value}) if math.isfinite(value) else None


def name_of(function: str, arguments: Mapping[str, Any]) -> str | None:
    """Return the name of a function of torch.nn.functional with these arguments, if it has one."""
    for name, row in TABLE.items():
        if row.function != function or row.arguments.keys() != arguments.keys():
            continue
        if row.arguments == arguments:
            return name
        value = arguments.get(row.parameter)
        if type(value) in (int, float) and math.isfinite(value):
            return f"{name}({float(value)!r})"
    return None


def function_of(module: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the function of torch.nn.functional that a layer of torch.nn calls, and its arguments.

    None for every other module, and for subclasses.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.nn."):
        return None
    for row in TABLE.values():
        if row.function is not None and row.module == kind.__name__:
            return row.function, {name: getattr(module, name) for name in row.arguments}
    return None
