"""From x_hat to y, and from dy back to dx: what happens to the sub-tiles once statistics are known.

With n = x_hat * weight + bias the affine's output, z = n * (1 + scale) + shift + residual and
y = activation(z); dz is the gradient at z, dx_hat that at x_hat. docs/math.md derives the backward.
"""

import triton
import triton.language as tl

from .activations import activate, activation_gradient
from .moments import normalise
from .tile import (
    add_to_channels,
    load_channels,
    load_tile,
    no_channel_sums,
    over_pixels,
    per_channel,
    store_tile,
    zero_outside,
)


@triton.jit
def load_gain(coeffs, window, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """weight * (1 + scale) of channel tile ``c``; z = x_hat * gain + offset + residual."""
    gain = per_channel(1.0, TILE, dtype)
    if coeffs.scale is not None:
        gain += load_channels(coeffs.scale, window, c, TILE, dtype)
    if coeffs.weight is not None:
        gain *= load_channels(coeffs.weight, window, c, TILE, dtype)
    return gain


@triton.jit
def load_offset(coeffs, window, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """bias * (1 + scale) + shift of channel tile ``c``."""
    offset = per_channel(0.0, TILE, dtype)
    if coeffs.bias is not None:
        offset += load_channels(coeffs.bias, window, c, TILE, dtype)
        if coeffs.scale is not None:
            offset += offset * load_channels(coeffs.scale, window, c, TILE, dtype)
    if coeffs.shift is not None:
        offset += load_channels(coeffs.shift, window, c, TILE, dtype)
    return offset


@triton.jit
def load_z(
    x, residual_ptr, gain, offset, pre_add, stats, window, c: tl.constexpr, p: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """z of the sub-tile x, with its part of the residual unless that is None."""
    z = normalise(x, pre_add, stats, window, p, TILE) * over_pixels(gain, window, p, TILE)
    z += over_pixels(offset, window, p, TILE)
    if residual_ptr is not None:
        z += load_tile(residual_ptr, window, c, p, TILE, "").to(z.dtype)
    return z


@triton.jit
def write_y(
    xs, residual_ptr, coeffs, stats, y_ptr, window, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """y of all sub-tiles."""
    dtype: tl.constexpr = stats.mean.dtype
    for c in tl.static_range(TILE.channel_tiles):
        gain = load_gain(coeffs, window, c, TILE, dtype)
        offset = load_offset(coeffs, window, c, TILE, dtype)
        pre_add = None
        if coeffs.pre_add is not None:
            pre_add = load_channels(coeffs.pre_add, window, c, TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            x = xs[c * TILE.pixel_tiles + p]
            z = load_z(x, residual_ptr, gain, offset, pre_add, stats, window, c, p, TILE)
            store_tile(y_ptr, activate(z, ACTIVATION, NVIDIA), window, c, p, TILE)


@triton.jit
def load_dzs(
    dy_ptr, residual_ptr, dresidual_ptr, xs, coeffs, stats, window, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, NVIDIA: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """dz of all sub-tiles, zeros if dy is None; writes it to dresidual unless that is None."""
    dtype: tl.constexpr = stats.mean.dtype
    dzs = ()
    for c in tl.static_range(TILE.channel_tiles):
        if ACTIVATION != "none":
            gain = load_gain(coeffs, window, c, TILE, dtype)
            offset = load_offset(coeffs, window, c, TILE, dtype)
            pre_add = None
            if coeffs.pre_add is not None:
                pre_add = load_channels(coeffs.pre_add, window, c, TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            if dy_ptr is None:
                dz = tl.zeros([TILE.rows, TILE.cols], dtype)
            else:
                dz = load_tile(dy_ptr, window, c, p, TILE, EVICT).to(dtype)
            if ACTIVATION != "none":
                x = xs[c * TILE.pixel_tiles + p]
                z = load_z(x, residual_ptr, gain, offset, pre_add, stats, window, c, p, TILE)
                dz = activation_gradient(dz, z, ACTIVATION, NVIDIA)
                if TILE.stacked:  # a sample that is not there has no statistics
                    dz = zero_outside(dz, window, c, p, TILE)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, dz, window, c, p, TILE)
            dzs = dzs + (dz,)
    return dzs


@triton.jit
def no_dz_sums(TILE: tl.constexpr, dtype: tl.constexpr):
    return no_channel_sums(TILE, dtype), no_channel_sums(TILE, dtype)


@triton.jit
def add_dz_sums(sums, dzs, xs, coeffs, stats, window, c: tl.constexpr, TILE: tl.constexpr):
    """Add dz and dz * x_hat of channel tile ``c`` to the pair of accumulators ``sums``."""
    dz_sums, dz_x_hat_sums = sums
    pre_add = None
    if coeffs.pre_add is not None:
        pre_add = load_channels(coeffs.pre_add, window, c, TILE, stats.mean.dtype)
    for p in tl.static_range(TILE.pixel_tiles):
        dz = dzs[c * TILE.pixel_tiles + p]
        x_hat = normalise(xs[c * TILE.pixel_tiles + p], pre_add, stats, window, p, TILE)
        dz_sums = add_to_channels(dz_sums, dz, window, p, TILE)
        dz_x_hat_sums = add_to_channels(dz_x_hat_sums, dz * x_hat, window, p, TILE)
    return dz_sums, dz_x_hat_sums


@triton.jit
def write_dx(
    dx_sums, dzs, xs, coeffs, stats, dx_hat_mean, dx_hat_x_hat_mean, dx_ptr, dpre_add_ptr, window,
    c: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx of channel tile ``c`` unless None; returned: the accumulator ``dx_sums`` with it added,
    if dpre_add is asked for.

    The two means over the group broadcast against a sub-tile.
    """
    gain = load_gain(coeffs, window, c, TILE, stats.mean.dtype)
    pre_add = None
    if coeffs.pre_add is not None:
        pre_add = load_channels(coeffs.pre_add, window, c, TILE, stats.mean.dtype)
    for p in tl.static_range(TILE.pixel_tiles):
        dx_hat = dzs[c * TILE.pixel_tiles + p] * over_pixels(gain, window, p, TILE)
        x_hat = normalise(xs[c * TILE.pixel_tiles + p], pre_add, stats, window, p, TILE)
        dx = (dx_hat - dx_hat_mean - x_hat * dx_hat_x_hat_mean) * stats.rstd
        if dx_ptr is not None:
            store_tile(dx_ptr, dx, window, c, p, TILE)
        if dpre_add_ptr is not None:
            inside = zero_outside(dx, window, c, p, TILE)
            dx_sums = add_to_channels(dx_sums, inside, window, p, TILE)
    return dx_sums
