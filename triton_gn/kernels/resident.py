"""Resident: a program holds whole groups of one sample on chip, so every tensor is touched once."""

import triton
import triton.language as tl

from .epilogue import add_dz_sums, no_dz_sums, write_dx, write_y
from .moments import divide, load_stats, rstd_of, spread_stats, store_stats, window_moments
from .params import store_dz_sums
from .tile import group_count, load_tiles, over_groups, whole_window


@triton.jit
def group_norm_forward_resident_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, groups, pixels, row_vecs, eps: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per ``TILE.groups`` groups of a sample.

    Reads x once, and weight and bias (C,) unless None; writes y once, and stats (N, G, 3) unless
    None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = whole_window(tl.program_id(0), groups, pixels, row_vecs, TILE)
    xs = load_tiles(x_ptr, window, TILE)
    moments = window_moments(xs, window, groups, TILE, dtype)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        store_stats(stats_ptr, moments, rstd, window, groups, TILE)
    write_y(xs, spread_stats(moments, rstd, TILE), weight_ptr, bias_ptr, y_ptr, window, TILE)


@triton.jit
def group_norm_backward_resident_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, dbias_ptr, dweight_ptr, groups, pixels, row_vecs,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per ``TILE.groups`` groups of a sample.

    Reads dy and x once, weight (C,) unless None, stats (N, G, 3). Writes dx once and, per sample
    and channel, sum(dz) to dbias (N, C) and sum(dz * x_hat) to dweight (N, C); each unless None.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    window = whole_window(tl.program_id(0), groups, pixels, row_vecs, TILE)
    xs = load_tiles(x_ptr, window, TILE)
    dys = load_tiles(dy_ptr, window, TILE)
    stats = load_stats(stats_ptr, window, groups, TILE)
    dx_hat_sum = tl.zeros([TILE.group_slots], dtype)
    dx_hat_x_hat_sum = tl.zeros([TILE.group_slots], dtype)
    for c in tl.static_range(TILE.channel_tiles):
        sums = add_dz_sums(no_dz_sums(TILE, dtype), dys, xs, stats, window, c, TILE)
        first, second = store_dz_sums(
            sums, weight_ptr, dbias_ptr, dweight_ptr, window, c, groups, 1, TILE
        )
        dx_hat_sum += first
        dx_hat_x_hat_sum += second
    if dx_ptr is not None:
        count = group_count(pixels, TILE, dtype)
        dx_hat_mean = over_groups(divide(dx_hat_sum, count), TILE)
        dx_hat_x_hat_mean = over_groups(divide(dx_hat_x_hat_sum, count), TILE)
        write_dx(dys, xs, stats, dx_hat_mean, dx_hat_x_hat_mean, weight_ptr, dx_ptr, window, TILE)
