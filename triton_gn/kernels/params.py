"""Per-channel sums of the backward: each program writes its own, then one fixed-order reduction.

No atomics: the same input gives the same bits, whatever the order in which programs finish.
"""

import triton
import triton.language as tl

from .tile import channel_sums, channels_of, group_sums, load_channels


@triton.jit
def store_dz_sums(
    sums, weight_ptr, dbias_ptr, dweight_ptr, window, c: tl.constexpr, groups, chunks,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the sums of dz and dz * x_hat of channel tile ``c``; return the group sums of dx_hat.

    dbias and dweight: (N * chunks, C), each unless None. Returned: sum(dx_hat) and
    sum(dx_hat * x_hat) over the window's part of each group, ``[group_slots]``.
    """
    dz_sum = channel_sums(sums[0], TILE)
    dz_x_hat_sum = channel_sums(sums[1], TILE)
    channels, mask = channels_of(window, c, TILE)
    row = (window.sample.to(tl.int64) * chunks + window.chunk) * (groups * TILE.group_channels)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + row + channels, dz_sum.to(dbias_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        values = dz_x_hat_sum.to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + row + channels, values, mask=mask)
    if weight_ptr is not None:
        weight = load_channels(weight_ptr, window, c, TILE, dz_sum.dtype)
        dz_sum *= weight
        dz_x_hat_sum *= weight
    return group_sums(dz_sum, TILE), group_sums(dz_x_hat_sum, TILE)


@triton.jit
def sum_rows(partial_ptr, total_ptr, block, rows, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program per ``COLS`` channels: ``partial`` (rows, channels) to ``total`` (channels,)."""
    cols = block * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], partial_ptr.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < channels)[None, :]
        offsets = row.to(tl.int64)[:, None] * channels + cols[None, :]
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + cols, total, mask=cols < channels)


@triton.jit
def sum_params(
    dbias_partial_ptr, dweight_partial_ptr, dbias_ptr, dweight_ptr, block, rows, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dbias and dweight (C,), each unless None."""
    if dbias_ptr is not None:
        sum_rows(dbias_partial_ptr, dbias_ptr, block, rows, channels, ROWS, COLS)
    if dweight_ptr is not None:
        sum_rows(dweight_partial_ptr, dweight_ptr, block, rows, channels, ROWS, COLS)


@triton.jit
def group_norm_params_kernel(
    dbias_partial_ptr, dweight_partial_ptr, dbias_ptr, dweight_ptr, rows, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program per ``COLS`` channels; see ``sum_params``."""
    sum_params(
        dbias_partial_ptr, dweight_partial_ptr, dbias_ptr, dweight_ptr, tl.program_id(0), rows,
        channels, ROWS, COLS,
    )  # fmt: skip
