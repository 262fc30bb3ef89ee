"""Per-element formulas, once statistics are known: from x to y, and from dy back to dx.

n = x_hat * weight + bias is the affine's output, z = n * (1 + scale) + shift + residual, and
y = activation(z). dz is the gradient at z, dx_hat the gradient at x_hat. docs/math.md derives the
backward, and how factors that do not change along the pixels are taken out of the work on each
element.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .moments import centre_of, centred, divide
from .reduce import (
    add_to_channels,
    as_tile_operand,
    broadcast_channels,
    broadcast_groups,
    group_count,
    per_channel,
    zero_channel_acc,
)
from .tile import (
    converted,
    load_channels,
    load_tile,
    store_tile,
    zero_beyond_pixels,
)


class Affine(NamedTuple):
    """Parameters of a channel tile: z = (x - centre) * gain + offset + residual."""

    centre: tl.tensor  # per channel, or per group
    gain: tl.tensor
    offset: tl.tensor


class Slope(NamedTuple):
    """Parameters of a channel tile: dx = dz * gain + offset - (x - centre) * slope."""

    centre: tl.tensor  # per channel, or per group
    gain: tl.tensor
    offset: tl.tensor  # per channel, or per group
    slope: tl.tensor  # per group


class DzSums(NamedTuple):
    """Accumulators of ``add_to_channels`` for dz and dz * (x - centre)."""

    dz: tl.tensor
    dz_centred: tl.tensor


class DxHat(NamedTuple):
    """Sums, or means, of dx_hat and of dx_hat * x_hat."""

    dx_hat: tl.tensor
    dx_hat_x_hat: tl.tensor


@triton.jit
def load_gain(affine_params, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """Compute weight * (1 + scale) of channel tile ``c``: z = x_hat * gain + offset + residual."""
    gain = per_channel(1.0, TILE, dtype)
    if affine_params.scale is not None:
        gain += load_channels(affine_params.scale, region, c, TILE, dtype)
    if affine_params.weight is not None:
        gain *= load_channels(affine_params.weight, region, c, TILE, dtype)
    return gain


@triton.jit
def load_offset(affine_params, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """Compute bias * (1 + scale) + shift of channel tile ``c``."""
    offset = per_channel(0.0, TILE, dtype)
    if affine_params.bias is not None:
        offset += load_channels(affine_params.bias, region, c, TILE, dtype)
        if affine_params.scale is not None:
            offset += offset * load_channels(affine_params.scale, region, c, TILE, dtype)
    if affine_params.shift is not None:
        offset += load_channels(affine_params.shift, region, c, TILE, dtype)
    return offset


@triton.jit
def load_affine(affine_params, stats, region, c: tl.constexpr, TILE: tl.constexpr):
    """Compute the Affine of channel tile ``c``: from x to z, before the residual."""
    dtype: tl.constexpr = stats.mean.dtype
    centre, centre_lo = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, region, c, TILE, dtype
    )
    gain = as_tile_operand(load_gain(affine_params, region, c, TILE, dtype), TILE) * stats.rstd
    offset = as_tile_operand(load_offset(affine_params, region, c, TILE, dtype), TILE)
    return Affine(centre, gain, offset - centre_lo * gain)


@triton.jit
def load_affine_to_activation(
    affine_params, stats, region, c: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Compute the Affine for ``dz_of``, or return () without an activation: dz is dy then."""
    if ACTIVATION is None:
        return ()
    else:
        return load_affine(affine_params, stats, region, c, TILE)


@triton.jit
def dx_hat_means(sums, pixels, TILE: tl.constexpr):
    """Divide the sums of each group by its number of elements, to broadcast against fragments."""
    count = group_count(pixels, TILE, sums.dx_hat.dtype)
    return DxHat(
        broadcast_groups(divide(sums.dx_hat, count), TILE),
        broadcast_groups(divide(sums.dx_hat_x_hat, count), TILE),
    )


@triton.jit
def load_slope(affine_params, stats, means, region, c: tl.constexpr, TILE: tl.constexpr):
    """Compute the Slope of channel tile ``c``, from dz to dx. ``means``: of each group."""
    dtype: tl.constexpr = stats.mean.dtype
    centre, centre_lo = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, region, c, TILE, dtype
    )
    gain = as_tile_operand(load_gain(affine_params, region, c, TILE, dtype), TILE) * stats.rstd
    slope = means.dx_hat_x_hat * stats.rstd * stats.rstd
    return Slope(centre, gain, centre_lo * slope - means.dx_hat * stats.rstd, slope)


@triton.jit
def _z_before_residual(x, affine, region, p: tl.constexpr, TILE: tl.constexpr):
    """Compute z of fragment x, before the residual."""
    gain = broadcast_channels(affine.gain, region, p, TILE)
    offset = broadcast_channels(affine.offset, region, p, TILE)
    return centred(x, affine.centre, region, p, TILE) * gain + offset


@triton.jit
def write_y(
    xs, residual_ptr, affine, y_ptr, region, c: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Compute and store y of channel tile ``c``."""
    # the last fragment first: ptxas needs fewer registers that way (docs/measured.md)
    for p in tl.static_range(TILE.pixel_tiles - 1, -1, -1):
        z = _z_before_residual(xs[c * TILE.pixel_tiles + p], affine, region, p, TILE)
        if residual_ptr is not None:
            z += load_tile(residual_ptr, region, c, p, TILE, "").to(z.dtype)
        if ACTIVATION is not None:
            z = ACTIVATION(z, TILE.nvidia)
        store_tile(y_ptr, z, region, c, p, TILE)


@triton.jit
def dz_of(
    dys, residuals, xs, affine, region, c: tl.constexpr, p: tl.constexpr, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Compute dz of fragment (c, p).

    ``dys``, ``residuals`` and ``xs`` are results of ``load_tiles``; without dys, dy is 0.
    ``affine`` is the result of ``load_affine_to_activation``.
    """
    if len(dys) == 0:
        dz = tl.zeros([TILE.rows, TILE.cols], dtype)
    else:
        dz = converted(dys[c * TILE.pixel_tiles + p], dtype, TILE)
    if ACTIVATION is not None:
        z = _z_before_residual(xs[c * TILE.pixel_tiles + p], affine, region, p, TILE)
        if len(residuals) > 0:
            z += converted(residuals[c * TILE.pixel_tiles + p], dtype, TILE)
        dz = ACTIVATION(dz, z, TILE.nvidia)
    return dz


@triton.jit
def zero_dz_sums(TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the empty accumulators of ``add_dz_sums``."""
    return DzSums(zero_channel_acc(TILE, dtype), zero_channel_acc(TILE, dtype))


@triton.jit
def add_dz_sums(acc, dz, x, centre, region, p: tl.constexpr, TILE: tl.constexpr):
    """Add dz and dz * (x - centre) of a fragment to the accumulators."""
    dz_centred = dz * centred(x, centre, region, p, TILE)
    return DzSums(
        add_to_channels(acc.dz, dz, region, p, TILE),
        add_to_channels(acc.dz_centred, dz_centred, region, p, TILE),
    )


@triton.jit
def write_dx(
    dx_acc, dz, x, slope, dx_ptr, dpre_add_ptr, region, c: tl.constexpr, p: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Compute dx of a fragment, store it unless ``dx_ptr`` is None, and return the accumulator.

    ``dx_acc`` grows by dx unless ``dpre_add_ptr`` is None.
    """
    dx = broadcast_channels(slope.offset, region, p, TILE)
    dx -= centred(x, slope.centre, region, p, TILE) * slope.slope
    dx += dz * broadcast_channels(slope.gain, region, p, TILE)
    if dx_ptr is not None:
        store_tile(dx_ptr, dx, region, c, p, TILE)
    if dpre_add_ptr is not None:
        dx = zero_beyond_pixels(dx, region, p, TILE)
        dx_acc = add_to_channels(dx_acc, dx, region, p, TILE)
    return dx_acc
