"""From x_hat to y, and from dy back to dx: what happens to the sub-tiles once statistics are known.

z = x_hat * weight + bias is the affine's output, dz the gradient there, dx_hat = dz * weight.
docs/math.md derives the backward.
"""

import triton
import triton.language as tl

from .moments import normalise
from .tile import (
    add_to_channels,
    load_channels,
    no_channel_sums,
    over_pixels,
    store_tile,
)


@triton.jit
def write_y(xs, stats, weight_ptr, bias_ptr, y_ptr, window, TILE: tl.constexpr):
    """y of all sub-tiles."""
    for c in tl.static_range(TILE.channel_tiles):
        if weight_ptr is not None:
            weight = load_channels(weight_ptr, window, c, TILE, stats.mean.dtype)
        if bias_ptr is not None:
            bias = load_channels(bias_ptr, window, c, TILE, stats.mean.dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            z = normalise(xs[c * TILE.pixel_tiles + p], stats)
            if weight_ptr is not None:
                z = z * over_pixels(weight, window, p, TILE)
            if bias_ptr is not None:
                z = z + over_pixels(bias, window, p, TILE)
            store_tile(y_ptr, z, window, c, p, TILE)


@triton.jit
def no_dz_sums(TILE: tl.constexpr, dtype: tl.constexpr):
    return no_channel_sums(TILE, dtype), no_channel_sums(TILE, dtype)


@triton.jit
def add_dz_sums(sums, dys, xs, stats, window, c: tl.constexpr, TILE: tl.constexpr):
    """Add dz and dz * x_hat of channel tile ``c`` to the pair of accumulators ``sums``."""
    dz_sums, dz_x_hat_sums = sums
    for p in tl.static_range(TILE.pixel_tiles):
        dz = dys[c * TILE.pixel_tiles + p].to(stats.mean.dtype)
        x_hat = normalise(xs[c * TILE.pixel_tiles + p], stats)
        dz_sums = add_to_channels(dz_sums, dz, window, p, TILE)
        dz_x_hat_sums = add_to_channels(dz_x_hat_sums, dz * x_hat, window, p, TILE)
    return dz_sums, dz_x_hat_sums


@triton.jit
def write_dx(
    dys, xs, stats, dx_hat_mean, dx_hat_x_hat_mean, weight_ptr, dx_ptr, window, TILE: tl.constexpr
):
    """dx of all sub-tiles; the two means over the group broadcast against a sub-tile."""
    for c in tl.static_range(TILE.channel_tiles):
        if weight_ptr is not None:
            weight = load_channels(weight_ptr, window, c, TILE, stats.mean.dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            dx_hat = dys[c * TILE.pixel_tiles + p].to(stats.mean.dtype)
            if weight_ptr is not None:
                dx_hat = dx_hat * over_pixels(weight, window, p, TILE)
            x_hat = normalise(xs[c * TILE.pixel_tiles + p], stats)
            dx = (dx_hat - dx_hat_mean - x_hat * dx_hat_x_hat_mean) * stats.rstd
            store_tile(dx_ptr, dx, window, c, p, TILE)
