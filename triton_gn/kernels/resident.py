"""Resident: a program holds whole groups of one sample on chip, so every tensor is touched once."""

import triton
import triton.language as tl

from .epilogue import (
    add_dz_sums,
    dz_of,
    load_affine,
    load_affine_to_activation,
    load_slope,
    write_dx,
    write_y,
)
from .moments import (
    centre_of,
    divide,
    load_stats,
    rstd_of,
    spread_stats,
    store_stats,
    tile_moments,
)
from .params import store_param_grads
from .tile import (
    SIZES,
    broadcast_groups,
    channel_sums,
    group_count,
    group_sums,
    load_tiles,
    store_channels,
    store_tile,
    whole_groups_tile,
    zero_channel_acc,
)


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_resident_kernel(
    x_ptr, residual_ptr, affine_params, y_ptr, stats_ptr, groups, pixels, row_vecs, eps: tl.float64,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per ``TILE.groups`` groups of a sample, or per group of a stack of ``pixels``.

    Reads x once, residual once unless None, and ``affine_params``; writes y once, and stats (N, G, 3)
    unless None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    program_tile = whole_groups_tile(tl.program_id(0), groups, pixels, row_vecs, TILE)
    xs = load_tiles(x_ptr, program_tile, TILE, "")
    moments = tile_moments(xs, affine_params.pre_add, program_tile, TILE, dtype)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        store_stats(stats_ptr, moments, rstd, program_tile, groups, TILE)
    stats = spread_stats(moments, rstd, TILE)
    for c in tl.static_range(TILE.channel_tiles):
        affine = load_affine(affine_params, stats, program_tile, c, TILE)
        write_y(xs, residual_ptr, affine, y_ptr, program_tile, c, TILE, ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_resident_kernel(
    dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, dx_ptr, dresidual_ptr, grads, groups, pixels,
    row_vecs, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per ``TILE.groups`` groups of a sample, or per group of a stack of ``pixels``.

    Reads dy, x and, unless None, residual once, ``affine_params``, stats (N, G, 3). Writes dx and
    dresidual once, and its sample's or stack's row of each of ``grads``; each unless None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    program_tile = whole_groups_tile(tl.program_id(0), groups, pixels, row_vecs, TILE)
    xs = load_tiles(x_ptr, program_tile, TILE, "")
    dys = load_tiles(dy_ptr, program_tile, TILE, "")
    residuals = load_tiles(residual_ptr, program_tile, TILE, "")
    stats = load_stats(stats_ptr, program_tile, groups, TILE)
    dzs = ()
    for c in tl.static_range(TILE.channel_tiles):
        affine = load_affine_to_activation(affine_params, stats, program_tile, c, TILE, ACTIVATION)
        centre, _ = centre_of(
            affine_params.pre_add, stats.mean, stats.mean_lo, program_tile, c, TILE, dtype
        )
        sums = zero_channel_acc(TILE, dtype), zero_channel_acc(TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, program_tile, c, p, TILE, ACTIVATION, dtype)
            if dresidual_ptr is not None:
                store_tile(dresidual_ptr, dz, program_tile, c, p, TILE)
            sums = add_dz_sums(
                sums, dz, xs[c * TILE.pixel_tiles + p], centre, program_tile, p, TILE
            )
            dzs = dzs + (dz,)
        first, second = store_param_grads(
            sums, affine_params, stats, grads, program_tile, c, groups, 1, TILE
        )
        if c == 0:
            dx_hat_sums, dx_hat_x_hat_sums = first, second
        else:
            dx_hat_sums += first
            dx_hat_x_hat_sums += second
    if dx_ptr is not None or grads.pre_add is not None:
        count = group_count(pixels, TILE, dtype)
        dx_hat_sum = group_sums(dx_hat_sums, TILE)
        dx_hat_x_hat_sum = group_sums(dx_hat_x_hat_sums, TILE)
        dx_hat_mean = broadcast_groups(divide(dx_hat_sum, count), TILE)
        dx_hat_x_hat_mean = broadcast_groups(divide(dx_hat_x_hat_sum, count), TILE)
        for c in tl.static_range(TILE.channel_tiles):
            slope = load_slope(
                affine_params, stats, dx_hat_mean, dx_hat_x_hat_mean, program_tile, c, TILE
            )
            dx_sums = zero_channel_acc(TILE, dtype)
            for p in tl.static_range(TILE.pixel_tiles):
                dx_sums = write_dx(
                    dx_sums, dzs[c * TILE.pixel_tiles + p], xs[c * TILE.pixel_tiles + p], slope,
                    dx_ptr, grads.pre_add, program_tile, c, p, TILE,
                )  # fmt: skip
            if grads.pre_add is not None:
                dpre_add = channel_sums(dx_sums, TILE)
                store_channels(grads.pre_add, dpre_add, program_tile, c, groups, 1, TILE)
