"""Gradients of per-channel operands: each program writes its own part, then one reduction.

No atomics and a fixed order: the same input gives the same bits, however the programs interleave.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import load_gain
from .moments import centre_of
from .tile import SIZES, as_tile_operand, channel_sums, load_channels, store_channels


class Reduction(NamedTuple):
    """Sum the rows of ``partial`` (rows, C) to ``total`` (total_rows, C), in equal iterations."""

    partial_ptr: tl.tensor
    total_ptr: tl.tensor
    total_rows: tl.tensor


@triton.jit
def store_param_grads(
    sums,
    affine_params,
    stats,
    grads,
    program_tile,
    c: tl.constexpr,
    groups,
    splits,
    TILE: tl.constexpr,
):
    """Write what the program_tile adds to each gradient but dpre_add, for channel tile ``c``.

    ``sums``: the accumulators of ``add_dz_sums``. Each gradient is (N * splits, C), or None.
    Returned: sum(dx_hat) and sum(dx_hat * x_hat) per channel, whose ``group_sums`` are those of the
    program_tile's part of each group; in a stack of samples the terms of these sums.
    """
    dtype: tl.constexpr = stats.mean.dtype
    _, rest = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, program_tile, c, TILE, dtype
    )
    dz_sum, dz_centred_sum = sums
    if not TILE.batch_rows:  # there each row has its own statistics, and group sums
        dz_sum, dz_centred_sum = channel_sums(dz_sum, TILE), channel_sums(dz_centred_sum, TILE)
    dz_x_hat_sum = (dz_centred_sum - dz_sum * rest) * stats.rstd
    of_groups, of_groups_x_hat = dz_sum, dz_x_hat_sum
    if TILE.batch_rows:
        dz_sum, dz_x_hat_sum = channel_sums(dz_sum, TILE), channel_sums(dz_x_hat_sum, TILE)
    if grads.shift is not None:
        store_channels(grads.shift, dz_sum, program_tile, c, groups, splits, TILE)
    if grads.scale is not None:
        dscale = dz_x_hat_sum
        if affine_params.weight is not None:
            dscale *= load_channels(affine_params.weight, program_tile, c, TILE, dtype)
        if affine_params.bias is not None:
            dscale += dz_sum * load_channels(affine_params.bias, program_tile, c, TILE, dtype)
        store_channels(grads.scale, dscale, program_tile, c, groups, splits, TILE)
    dweight, dbias = dz_x_hat_sum, dz_sum
    if affine_params.scale is not None:
        scale = load_channels(affine_params.scale, program_tile, c, TILE, dtype)
        dweight += dweight * scale
        dbias += dbias * scale
    if grads.weight is not None:
        store_channels(grads.weight, dweight, program_tile, c, groups, splits, TILE)
    if grads.bias is not None:
        store_channels(grads.bias, dbias, program_tile, c, groups, splits, TILE)
    gain = load_gain(affine_params, program_tile, c, TILE, dtype)
    if TILE.batch_rows:
        gain = as_tile_operand(gain, TILE)
    return of_groups * gain, of_groups_x_hat * gain


@triton.jit
def _sum_rows(
    partial_ptr, total_ptr, total_row, block, rows, channels, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One row of a total, ``COLS`` channels of it, from ``rows`` rows of the partial."""
    cols = block * COLS + tl.arange(0, COLS)
    start = total_row.to(tl.int64) * rows
    acc = tl.zeros([ROWS, COLS], partial_ptr.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < channels)[None, :]
        offsets = (start + row)[:, None] * channels + cols[None, :]
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + total_row.to(tl.int64) * channels + cols, total, mask=cols < channels)


@triton.jit
def sum_params(reductions, pid, rows, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Program ``pid`` of those that reduce: one per row of a total and ``COLS`` channels of it.

    ``reductions``: a ``Params`` of ``Reduction``, each or None; ``rows`` of every partial.
    """
    blocks = tl.cdiv(channels, COLS)
    first = 0
    for k in tl.static_range(5):
        if reductions[k] is not None:
            one = reductions[k]
            programs = blocks * one.total_rows
            if (pid >= first) & (pid < first + programs):
                _sum_rows(
                    one.partial_ptr, one.total_ptr, (pid - first) // blocks, (pid - first) % blocks,
                    rows // one.total_rows, channels, ROWS, COLS,
                )  # fmt: skip
            first += programs


@triton.jit(do_not_specialize=SIZES)
def group_norm_params_kernel(reductions, rows, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program per row of a gradient and ``COLS`` channels; see ``sum_params``."""
    sum_params(reductions, tl.program_id(0), rows, channels, ROWS, COLS)
