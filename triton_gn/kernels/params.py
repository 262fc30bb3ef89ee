"""Gradients of per-channel operands: each program writes its own part, then one reduction.

No atomics and a fixed order: the same input gives the same bits, however the programs interleave.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .epilogue import DxHat, load_gain
from .moments import centre_of
from .reduce import as_tile_operand, channel_sums
from .tile import SIZES, Params, load_channels, store_channels

# rows and channels of a partial gradient that a program adds up at a time: 32 channels of float32
# are one 128-byte line
REDUCE_ROWS = tl.constexpr(64)
REDUCE_COLS = tl.constexpr(32)
# Triton 3.6 cannot take the length of a struct with None in it
NUM_PARAMS = tl.constexpr(len(Params._fields))


class ChannelSums(NamedTuple):
    """Sums of dz and dz * x_hat over the pixels of a program tile.

    They are per channel. With ``TILE.batch_rows`` they are per element of a fragment, as each row
    has its own statistics.
    """

    dz: tl.tensor
    dz_x_hat: tl.tensor


class ParamGrads(NamedTuple):
    """A program tile's part of the gradients per channel.

    All fields are tensors: Triton 3.6 cannot return None in a struct.
    """

    weight: tl.tensor
    bias: tl.tensor
    scale: tl.tensor  # computed only if there is a gradient to store
    shift: tl.tensor


class Reduction(NamedTuple):
    """Sum of the rows of ``partial`` (rows, C) to ``total`` (total_rows, C), in equal parts."""

    partial_ptr: tl.tensor
    total_ptr: tl.tensor
    total_rows: tl.tensor


@triton.jit
def sum_over_pixels(acc, affine_params, stats, region, c: tl.constexpr, TILE: tl.constexpr):
    """Compute the ChannelSums of channel tile ``c`` from the accumulators of ``add_dz_sums``."""
    _, centre_lo = centre_of(
        affine_params.pre_add, stats.mean, stats.mean_lo, region, c, TILE, stats.mean.dtype
    )
    dz, dz_centred = acc
    if not TILE.batch_rows:
        dz, dz_centred = channel_sums(dz, TILE), channel_sums(dz_centred, TILE)
    return ChannelSums(dz, (dz_centred - dz * centre_lo) * stats.rstd)


@triton.jit
def compute_param_grads(
    sums, affine_params, grads, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Compute ParamGrads of channel tile ``c`` from ChannelSums, for those in ``grads``."""
    dz, dz_x_hat = sums
    if TILE.batch_rows:
        dz, dz_x_hat = channel_sums(dz, TILE), channel_sums(dz_x_hat, TILE)
    dscale = dz_x_hat
    if grads.scale is not None:
        if affine_params.weight is not None:
            dscale *= load_channels(affine_params.weight, region, c, TILE, dtype)
        if affine_params.bias is not None:
            dscale += dz * load_channels(affine_params.bias, region, c, TILE, dtype)
    dweight, dbias = dz_x_hat, dz
    if affine_params.scale is not None:
        scale = load_channels(affine_params.scale, region, c, TILE, dtype)
        dweight += dweight * scale
        dbias += dbias * scale
    return ParamGrads(dweight, dbias, dscale, dz)


@triton.jit
def store_param_grads(grads, values, region, c: tl.constexpr, TILE: tl.constexpr):
    """Store ParamGrads to the program's rows of ``grads``, each unless None there."""
    if grads.shift is not None:
        store_channels(grads.shift, values.shift, region, c, TILE)
    if grads.scale is not None:
        store_channels(grads.scale, values.scale, region, c, TILE)
    if grads.weight is not None:
        store_channels(grads.weight, values.weight, region, c, TILE)
    if grads.bias is not None:
        store_channels(grads.bias, values.bias, region, c, TILE)


@triton.jit
def dx_hat_terms(
    sums, affine_params, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Compute the terms of sum(dx_hat) and sum(dx_hat * x_hat) from ChannelSums.

    ``group_sums`` of the terms are the program tile's part of these sums.
    """
    gain = load_gain(affine_params, region, c, TILE, dtype)
    if TILE.batch_rows:
        gain = as_tile_operand(gain, TILE)
    return DxHat(sums.dz * gain, sums.dz_x_hat * gain)


@triton.jit
def _sum_rows(partial_ptr, total_ptr, total_row, block, rows, channels):
    """Sum ``rows`` rows of the partial to one row of a total, ``REDUCE_COLS`` channels of it."""
    cols = block * REDUCE_COLS + tl.arange(0, REDUCE_COLS)
    start = total_row.to(tl.int64) * rows
    acc = tl.zeros([REDUCE_ROWS, REDUCE_COLS], partial_ptr.dtype.element_ty)
    for first in range(0, rows, REDUCE_ROWS):
        row = first + tl.arange(0, REDUCE_ROWS)
        mask = (row < rows)[:, None] & (cols < channels)[None, :]
        offsets = (start + row)[:, None] * channels + cols[None, :]
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + total_row.to(tl.int64) * channels + cols, total, mask=cols < channels)


@triton.jit
def sum_params(reductions, pid, rows, channels):
    """Do the part of program ``pid``: one row of a total and ``REDUCE_COLS`` channels of it.

    ``reductions`` are Params of ``Reduction``, each or None; every partial has ``rows`` rows.
    """
    blocks = tl.cdiv(channels, REDUCE_COLS)
    first = 0
    for k in tl.static_range(NUM_PARAMS):
        if reductions[k] is not None:
            reduction = reductions[k]
            programs = blocks * reduction.total_rows
            if (pid >= first) & (pid < first + programs):
                total_row, block = (pid - first) // blocks, (pid - first) % blocks
                _sum_rows(
                    reduction.partial_ptr, reduction.total_ptr, total_row, block,
                    rows // reduction.total_rows, channels,
                )  # fmt: skip
            first += programs


@triton.jit(do_not_specialize=SIZES)
def group_norm_params_kernel(reductions, rows, channels):
    """One program per row of a gradient and ``REDUCE_COLS`` channels.

    Reads partials (rows, C) and writes totals (total_rows, C): the ``reductions``, Params of
    ``Reduction``.
    """
    sum_params(reductions, tl.program_id(0), rows, channels)
