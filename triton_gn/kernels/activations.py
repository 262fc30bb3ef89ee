"""Activations, each beside its derivative.

``NVIDIA`` says that the kernel is compiled for such a GPU: there exp2 and the reciprocal are one
instruction each, within 2 ulp, where Triton's own take several. docs/math.md has the formulas.
"""

import triton
import triton.language as tl

_LEAKY_SLOPE = tl.constexpr(0.01)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_GELU_TANH_GAIN = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
_GELU_TANH_CUBIC = tl.constexpr(0.044715)
_SATURATED = tl.constexpr(20.0)  # tanh(softplus(20)) is 1, in float64 too
_TANH_SERIES = tl.constexpr(0.25)  # below it 1 - 2 / (1 + exp(2 z)) cancels


@triton.jit
def _exp(z, NVIDIA: tl.constexpr):
    if NVIDIA and z.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [z * _LOG2_E], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(z)


@triton.jit
def _reciprocal(z, NVIDIA: tl.constexpr):
    if NVIDIA and z.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [z], tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / z


@triton.jit
def _sigmoid(z, NVIDIA: tl.constexpr):
    return _reciprocal(1.0 + _exp(-z, NVIDIA), NVIDIA)


@triton.jit
def _relu(z):
    return tl.where(z < 0, 0.0, z)  # a NaN stays one


@triton.jit
def _relu_gradient(dy, z):
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def _leaky_relu(z):
    return tl.where(z < 0, z * _LEAKY_SLOPE, z)


@triton.jit
def _leaky_relu_gradient(dy, z):
    return tl.where(z > 0, dy, dy * _LEAKY_SLOPE)


@triton.jit
def _silu(z, NVIDIA: tl.constexpr):
    return z * _sigmoid(z, NVIDIA)


@triton.jit
def _silu_gradient(dy, z, NVIDIA: tl.constexpr):
    s = _sigmoid(z, NVIDIA)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def _normal(z, NVIDIA: tl.constexpr):
    """The normal distribution up to z, and exp(-z^2 / 2)."""
    e = _exp(z * z * -0.5, NVIDIA)
    if z.dtype == tl.float64:
        return 0.5 + 0.5 * tl.erf(z * _SQRT_HALF), e
    else:
        # half the instructions of erf, and a tail that does not cancel
        t = _reciprocal(1.0 + tl.abs(z) * 0.29, NVIDIA)
        s = 0.036831271710132625 * t - 0.1802816009202154
        s = (s * t + 0.27936977619430214) * t - 0.11975520522142305
        s = (s * t + 0.16351701297354865) * t + 0.08637094015914033
        s = (s * t + 0.1184121259066524) * t + 0.1155356719541039
        tail = s * t * e
        return tl.where(z < 0, tail, 1.0 - tail), e


@triton.jit
def _gelu(z, NVIDIA: tl.constexpr):
    below, _ = _normal(z, NVIDIA)
    return z * below


@triton.jit
def _gelu_gradient(dy, z, NVIDIA: tl.constexpr):
    below, e = _normal(z, NVIDIA)
    return dy * (below + z * (e * _INV_SQRT_2_PI))


@triton.jit
def _gelu_tanh(z, NVIDIA: tl.constexpr):
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel
    return z * _sigmoid((z + z * z * z * _GELU_TANH_CUBIC) * _GELU_TANH_GAIN, NVIDIA)


@triton.jit
def _gelu_tanh_gradient(dy, z, NVIDIA: tl.constexpr):
    q = (z + z * z * z * _GELU_TANH_CUBIC) * _GELU_TANH_GAIN
    slope = (z * z * (3.0 * _GELU_TANH_CUBIC) + 1.0) * _GELU_TANH_GAIN
    # s * (1 - s) is e * r * r, where 1 - s would lose digits that z * slope makes matter
    e = _exp(-tl.abs(q), NVIDIA)
    r = _reciprocal(1.0 + e, NVIDIA)
    s = tl.where(q < 0, e * r, r)
    return dy * (s + e * r * r * slope * z)


@triton.jit
def _mish(z, NVIDIA: tl.constexpr):
    e = _exp(tl.where(z > _SATURATED, _SATURATED, z), NVIDIA)
    numerator = e * (e + 2.0)
    return z * (numerator * _reciprocal(numerator + 2.0, NVIDIA))


@triton.jit
def _mish_gradient(dy, z, NVIDIA: tl.constexpr):
    z = tl.where(z > _SATURATED, _SATURATED, z)
    e = _exp(z, NVIDIA)
    numerator = e * (e + 2.0)
    r = _reciprocal(numerator + 2.0, NVIDIA)
    return dy * (numerator * r + z * (4.0 * r) * (e * (1.0 + e) * r))


@triton.jit
def _sigmoid_gradient(dy, z, NVIDIA: tl.constexpr):
    s = _sigmoid(z, NVIDIA)
    return dy * (s * (1.0 - s))


@triton.jit
def _tanh(z, NVIDIA: tl.constexpr):
    # Taylor's series, to the precision of the dtype below _TANH_SERIES
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
    return tl.where(tl.abs(z) < _TANH_SERIES, series, 1.0 - 2.0 * _sigmoid(-2.0 * z, NVIDIA))


@triton.jit
def _tanh_gradient(dy, z, NVIDIA: tl.constexpr):
    s = _sigmoid(2.0 * z, NVIDIA)
    return dy * (4.0 * s * (1.0 - s))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, NVIDIA: tl.constexpr):
    """y of z."""
    if ACTIVATION == "relu":
        return _relu(z)
    elif ACTIVATION == "leaky_relu":
        return _leaky_relu(z)
    elif ACTIVATION == "silu":
        return _silu(z, NVIDIA)
    elif ACTIVATION == "gelu":
        return _gelu(z, NVIDIA)
    elif ACTIVATION == "gelu_tanh":
        return _gelu_tanh(z, NVIDIA)
    elif ACTIVATION == "mish":
        return _mish(z, NVIDIA)
    elif ACTIVATION == "sigmoid":
        return _sigmoid(z, NVIDIA)
    elif ACTIVATION == "tanh":
        return _tanh(z, NVIDIA)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z


@triton.jit
def activation_gradient(dy, z, ACTIVATION: tl.constexpr, NVIDIA: tl.constexpr):
    """dz of dy and z."""
    if ACTIVATION == "relu":
        return _relu_gradient(dy, z)
    elif ACTIVATION == "leaky_relu":
        return _leaky_relu_gradient(dy, z)
    elif ACTIVATION == "silu":
        return _silu_gradient(dy, z, NVIDIA)
    elif ACTIVATION == "gelu":
        return _gelu_gradient(dy, z, NVIDIA)
    elif ACTIVATION == "gelu_tanh":
        return _gelu_tanh_gradient(dy, z, NVIDIA)
    elif ACTIVATION == "mish":
        return _mish_gradient(dy, z, NVIDIA)
    elif ACTIVATION == "sigmoid":
        return _sigmoid_gradient(dy, z, NVIDIA)
    elif ACTIVATION == "tanh":
        return _tanh_gradient(dy, z, NVIDIA)
    else:
        tl.static_assert(ACTIVATION == "none")
        return dy
