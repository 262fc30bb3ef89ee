"""Resident: a program holds whole groups of one sample on chip, so each tensor is touched once."""

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import (
    DxHat,
    add_dz_sums,
    dx_hat_means,
    dz_of,
    load_affine,
    load_affine_to_activation,
    load_slope,
    write_dx,
    write_y,
    zero_dz_sums,
)
from .moments import broadcast_stats, centre_of, load_stats, rstd_of, store_stats, tile_moments
from .params import compute_param_grads, dx_hat_terms, store_param_grads, sum_over_pixels
from .reduce import channel_sums, group_sums, zero_channel_acc
from .tile import SIZES, load_tiles, store_channels, store_tile, whole_groups_tile


class TensorShape(NamedTuple):
    """Sizes of x that a resident program needs."""

    groups: tl.tensor
    pixels: tl.tensor  # H*W; with ``TILE.batch_rows`` the samples
    row_vecs: tl.tensor  # length of a memory row, in vectors


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_resident_kernel(
    inputs, y_ptr, stats_ptr, groups, pixels, row_vecs, eps: tl.float64, TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One program per ``TILE.groups`` groups of a sample, or per group of several samples.

    Reads x and, unless None, residual once, and ``affine_params``. Writes y once, and stats
    (N, G, 3) unless None.
    """
    x_ptr, affine_params = inputs.x_ptr, inputs.affine_params
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    shape = TensorShape(groups, pixels, row_vecs)
    region = whole_groups_tile(tl.program_id(0), shape, TILE)
    xs = load_tiles(x_ptr, region, TILE, "")
    moments = tile_moments(xs, affine_params.pre_add, region, TILE, dtype)
    rstd = rstd_of(moments, eps)
    if stats_ptr is not None:
        store_stats(stats_ptr, moments, rstd, region, TILE)
    stats = broadcast_stats(moments.mean, moments.mean_lo, rstd, TILE)
    for c in tl.static_range(TILE.channel_tiles):
        affine = load_affine(affine_params, stats, region, c, TILE)
        write_y(xs, inputs.residual_ptr, affine, y_ptr, region, c, TILE, ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_resident_kernel(
    inputs, outputs, groups, pixels, row_vecs, TILE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One program per ``TILE.groups`` groups of a sample, or per group of several samples.

    Reads x and, unless None, dy and residual once, ``affine_params`` and stats (N, G, 3). Writes
    dx and dresidual once, and the program's row of each of ``grads`` (rows, C), each unless None.
    """
    x_ptr, affine_params, grads = inputs.x_ptr, inputs.affine_params, outputs.grads
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    region = whole_groups_tile(tl.program_id(0), TensorShape(groups, pixels, row_vecs), TILE)
    xs = load_tiles(x_ptr, region, TILE, "")
    dys = load_tiles(inputs.dy_ptr, region, TILE, "")
    residuals = load_tiles(inputs.residual_ptr, region, TILE, "")
    stats = load_stats(inputs.stats_ptr, region, TILE)
    dzs = ()
    for c in tl.static_range(TILE.channel_tiles):
        affine = load_affine_to_activation(affine_params, stats, region, c, TILE, ACTIVATION)
        centre, _ = centre_of(
            affine_params.pre_add, stats.mean, stats.mean_lo, region, c, TILE, dtype
        )
        dz_acc = zero_dz_sums(TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            dz = dz_of(dys, residuals, xs, affine, region, c, p, TILE, ACTIVATION, dtype)
            if outputs.dresidual_ptr is not None:
                store_tile(outputs.dresidual_ptr, dz, region, c, p, TILE)
            x = xs[c * TILE.pixel_tiles + p]
            dz_acc = add_dz_sums(dz_acc, dz, x, centre, region, p, TILE)
            dzs = dzs + (dz,)
        sums = sum_over_pixels(dz_acc, affine_params, stats, region, c, TILE)
        param_grads = compute_param_grads(sums, affine_params, grads, region, c, TILE, dtype)
        store_param_grads(grads, param_grads, region, c, TILE)
        terms = dx_hat_terms(sums, affine_params, region, c, TILE, dtype)
        if c == 0:
            dx_hat, dx_hat_x_hat = terms
        else:
            dx_hat += terms.dx_hat
            dx_hat_x_hat += terms.dx_hat_x_hat
    if outputs.dx_ptr is not None or grads.pre_add is not None:
        group_totals = DxHat(group_sums(dx_hat, TILE), group_sums(dx_hat_x_hat, TILE))
        means = dx_hat_means(group_totals, pixels, TILE)
        for c in tl.static_range(TILE.channel_tiles):
            slope = load_slope(affine_params, stats, means, region, c, TILE)
            dx_acc = zero_channel_acc(TILE, dtype)
            for p in tl.static_range(TILE.pixel_tiles):
                dz, x = dzs[c * TILE.pixel_tiles + p], xs[c * TILE.pixel_tiles + p]
                dx_acc = write_dx(
                    dx_acc, dz, x, slope, outputs.dx_ptr, grads.pre_add, region, c, p, TILE
                )
            if grads.pre_add is not None:
                store_channels(grads.pre_add, channel_sums(dx_acc, TILE), region, c, TILE)
