"""From x to y, and from dy back to dx: what happens to the fragments once statistics are known.

With n = x_hat * weight + bias the affine's output, z = n * (1 + scale) + shift + residual and
y = activation(z); dz is the gradient at z, dx_hat that at x_hat. docs/math.md derives the backward,
and how what does not change along the pixels is taken out of the work on each element.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .moments import centre_of, centred
from .tile import (
    add_to_channels,
    as_tile_operand,
    broadcast_channels,
    load_channels,
    load_tile,
    per_channel,
    store_tile,
    unpacked,
    zero_beyond_pixels,
)


class Affine(NamedTuple):
    """Of a channel tile: z = (x - centre) * gain + offset + residual."""

    centre: tl.tensor  # per channel, or per group
    gain: tl.tensor
    offset: tl.tensor


class Slope(NamedTuple):
    """Of a channel tile: dx = dz * gain + offset - (x - centre) * slope."""

    centre: tl.tensor  # per channel, or per group
    gain: tl.tensor
    offset: tl.tensor  # per channel, or per group
    slope: tl.tensor  # per group


@triton.jit
def load_gain(
    affine_params, program_tile, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """weight * (1 + scale) of channel tile ``c``; z = x_hat * gain + offset + residual."""
    gain = per_channel(1.0, TILE, dtype)
    if affine_params.scale is not None:
        gain += load_channels(affine_params.scale, program_tile, c, TILE, dtype)
    if affine_params.weight is not None:
        gain *= load_channels(affine_params.weight, program_tile, c, TILE, dtype)
    return gain


@triton.jit
def load_offset(
    affine_params, program_tile, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """bias * (1 + scale) + shift of channel tile ``c``."""
    offset = per_channel(0.0, TILE, dtype)
    if affine_params.bias is not None:
        offset += load_channels(affine_params.bias, program_tile, c, TILE, dtype)
        if affine_params.scale is not None:
            offset += offset * load_channels(affine_params.scale, program_tile, c, TILE, dtype)
    if affine_params.shift is not None:
        offset += load_channels(affine_params.shift, program_tile, c, TILE, dtype)
    return offset


@triton.jit
def load_affine(affine_params, stats, program_tile, c: tl.constexpr, TILE: tl.constexpr):
    """From x to z, before the residual."""
    dtype: tl.constexpr = stats.mean.dtype
    centre, rest = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, program_tile, c, TILE, dtype
    )
    gain = (
        as_tile_operand(load_gain(affine_params, program_tile, c, TILE, dtype), TILE) * stats.rstd
    )
    offset = as_tile_operand(load_offset(affine_params, program_tile, c, TILE, dtype), TILE)
    return Affine(centre, gain, offset - rest * gain)


@triton.jit
def load_affine_to_activation(
    affine_params,
    stats,
    program_tile,
    c: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``load_affine`` for ``dz_of``, which has no use for it without an activation: then ()."""
    if ACTIVATION is None:
        return ()
    else:
        return load_affine(affine_params, stats, program_tile, c, TILE)


@triton.jit
def load_slope(
    affine_params,
    stats,
    dx_hat_mean,
    dx_hat_x_hat_mean,
    program_tile,
    c: tl.constexpr,
    TILE: tl.constexpr,
):
    """From dz to dx. The two means over the group broadcast against a fragment."""
    dtype: tl.constexpr = stats.mean.dtype
    centre, rest = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, program_tile, c, TILE, dtype
    )
    gain = (
        as_tile_operand(load_gain(affine_params, program_tile, c, TILE, dtype), TILE) * stats.rstd
    )
    slope = dx_hat_x_hat_mean * stats.rstd * stats.rstd
    return Slope(centre, gain, rest * slope - dx_hat_mean * stats.rstd, slope)


@triton.jit
def _z_of(x, affine, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """z of the fragment x, before the residual."""
    z = centred(x, affine.centre, program_tile, p, TILE)
    return z * broadcast_channels(affine.gain, program_tile, p, TILE) + broadcast_channels(
        affine.offset, program_tile, p, TILE
    )


@triton.jit
def _write_y_tile(
    xs, residual_ptr, affine, y_ptr, program_tile, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    z = _z_of(xs[c * TILE.pixel_tiles + p], affine, program_tile, p, TILE)
    if residual_ptr is not None:
        z += load_tile(residual_ptr, program_tile, c, p, TILE, "").to(z.dtype)
    if ACTIVATION is not None:
        z = ACTIVATION(z, TILE.nvidia)
    store_tile(y_ptr, z, program_tile, c, p, TILE)


@triton.jit
def write_y(
    xs, residual_ptr, affine, y_ptr, program_tile, c: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y of channel tile ``c``."""
    for k in tl.static_range(TILE.pixel_tiles):
        # backwards, for which ptxas needs fewer registers (docs/measured.md)
        _write_y_tile(
            xs,
            residual_ptr,
            affine,
            y_ptr,
            program_tile,
            c,
            TILE.pixel_tiles - 1 - k,
            TILE,
            ACTIVATION,
        )


@triton.jit
def dz_of(
    dys, residuals, xs, affine, program_tile, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dz of a fragment, from the ``load_tiles`` of dy (zeros if there are none), the residual and
    x. ``affine`` as ``load_affine_to_activation`` has it."""
    if len(dys) == 0:
        dz = tl.zeros([TILE.rows, TILE.cols], dtype)
    else:
        dz = unpacked(dys[c * TILE.pixel_tiles + p], dtype, TILE)
    if ACTIVATION is not None:
        z = _z_of(xs[c * TILE.pixel_tiles + p], affine, program_tile, p, TILE)
        if len(residuals) > 0:
            z += unpacked(residuals[c * TILE.pixel_tiles + p], dtype, TILE)
        dz = ACTIVATION(dz, z, TILE.nvidia)
    return dz


@triton.jit
def add_dz_sums(sums, dz, x, centre, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """Add dz and dz * (x - centre) of a fragment to the pair of accumulators ``sums``."""
    dz_sums, dz_centred_sums = sums
    dz_centred = dz * centred(x, centre, program_tile, p, TILE)
    return (
        add_to_channels(dz_sums, dz, program_tile, p, TILE),
        add_to_channels(dz_centred_sums, dz_centred, program_tile, p, TILE),
    )


@triton.jit
def write_dx(
    dx_sums, dz, x, slope, dx_ptr, dpre_add_ptr, program_tile, c: tl.constexpr, p: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """dx of a fragment unless None; returned: the accumulator ``dx_sums`` with it added, if
    dpre_add is asked for."""
    dx = broadcast_channels(slope.offset, program_tile, p, TILE)
    dx -= centred(x, slope.centre, program_tile, p, TILE) * slope.slope
    dx += dz * broadcast_channels(slope.gain, program_tile, p, TILE)
    if dx_ptr is not None:
        store_tile(dx_ptr, dx, program_tile, c, p, TILE)
    if dpre_add_ptr is not None:
        inside = zero_beyond_pixels(dx, program_tile, p, TILE)
        dx_sums = add_to_channels(dx_sums, inside, program_tile, p, TILE)
    return dx_sums
