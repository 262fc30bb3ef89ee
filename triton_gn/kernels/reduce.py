"""Sums of fragments over pixels, channels and groups, and the way back: broadcasts.

Per-channel values have the shape of ``tile.channels_of``, per-group values ``[padded_groups]``.
"""

import triton
import triton.language as tl


@triton.jit
def free_layout(values, size: tl.constexpr, TILE: tl.constexpr):
    """Return the same ``size`` values, in a layout that the compiler may choose.

    If there are as many values as threads, they keep the layout they are loaded in, and the
    compiler would convert all fragments to it. A gather accepts any layout.
    """
    if size >= TILE.threads:
        return tl.gather(values, tl.arange(0, size), 0)
    else:
        return values


@triton.jit
def per_channel(value, TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the same value for each channel, in the shape of ``channels_of``."""
    if TILE.channels_last:
        return tl.full([1, TILE.cols], value, dtype)
    else:
        return tl.full([TILE.rows, TILE.channels_per_row], value, dtype)


@triton.jit
def as_tile_operand(values, TILE: tl.constexpr):
    """Return the same per-channel values, in a layout that suits arithmetic with fragments."""
    if TILE.channels_last:
        return free_layout(tl.reshape(values, [TILE.cols]), TILE.cols, TILE)[None, :]
    else:
        return values


@triton.jit
def _lane_of_columns(region, p: tl.constexpr, TILE: tl.constexpr):
    """Return, for each column of pixel tile ``p``, which of the ``channels_per_row`` it is in."""
    cols = region.block.first_pixel + p * TILE.cols + tl.arange(0, TILE.cols)
    return (cols // region.shape.pixels)[None, :]


@triton.jit
def broadcast_channels(values, region, p: tl.constexpr, TILE: tl.constexpr):
    """Make per-channel or per-group values broadcast against the fragments of pixel tile ``p``."""
    if TILE.channels_per_row == 1 or values.shape[1] == 1:
        return values
    else:
        column_lanes = _lane_of_columns(region, p, TILE)
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        spread = tl.zeros([TILE.rows, TILE.cols], values.dtype)
        for lane in tl.static_range(TILE.channels_per_row):
            value = tl.sum(tl.where(lanes == lane, values, 0.0), axis=1, keep_dims=True)
            spread = tl.where(column_lanes == lane, value, spread)
        return spread


@triton.jit
def zero_channel_acc(TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the empty accumulator of ``add_to_channels``."""
    if TILE.channels_per_row == 1:
        return tl.zeros([TILE.rows, TILE.cols], dtype)
    else:
        return tl.zeros([TILE.rows, TILE.channels_per_row], dtype)


@triton.jit
def add_to_channels(acc, values, region, p: tl.constexpr, TILE: tl.constexpr):
    """Add a fragment of pixel tile ``p``; only ``channel_sums`` sums the pixels up."""
    if TILE.channels_per_row == 1:
        return acc + values
    else:
        column_lanes = _lane_of_columns(region, p, TILE)
        lanes = tl.arange(0, TILE.channels_per_row)[None, :]
        for lane in tl.static_range(TILE.channels_per_row):
            lane_sum = tl.sum(tl.where(column_lanes == lane, values, 0.0), axis=1, keep_dims=True)
            acc += tl.where(lanes == lane, lane_sum, 0.0)
        return acc


@triton.jit
def channel_sums(acc, TILE: tl.constexpr):
    """Sum an accumulator over its pixels: per-channel values."""
    if TILE.channels_last:
        return tl.sum(acc, axis=0, keep_dims=True)
    elif TILE.channels_per_row == 1:
        return tl.sum(acc, axis=1, keep_dims=True)
    else:
        return acc


@triton.jit
def group_sums(values, TILE: tl.constexpr):
    """Sum a fragment, or per-channel values, over each group: ``[padded_groups]``.

    Entries past the last group hold garbage.
    """
    if TILE.batch_rows:
        return tl.sum(values, axis=1)
    elif TILE.groups == 1:
        return tl.sum(values) + tl.zeros([1], values.dtype)
    else:
        # gather each group's channels to a row of their own; past the last channel, repeat it
        width: tl.constexpr = triton.next_power_of_2(TILE.group_channels)
        lanes = tl.arange(0, width)[None, :]
        channels = tl.arange(0, TILE.padded_groups)[:, None] * TILE.group_channels + lanes
        channels = tl.reshape(tl.minimum(channels, TILE.cols - 1), [TILE.padded_groups * width])
        by_channel = tl.gather(tl.sum(values, axis=0), channels, 0)
        by_group = tl.reshape(by_channel, [TILE.padded_groups, width])
        return tl.sum(tl.where(lanes < TILE.group_channels, by_group, 0.0), axis=1)


@triton.jit
def broadcast_groups(values, TILE: tl.constexpr):
    """Make per-group values broadcast against a fragment."""
    if TILE.batch_rows:
        return values[:, None]
    elif TILE.groups == 1:
        return values[None, :]
    else:
        # columns past the last group take some group's value: their elements are 0 or never stored
        group = tl.minimum(tl.arange(0, TILE.cols) // TILE.group_channels, TILE.padded_groups - 1)
        return tl.gather(values, group, 0)[None, :]


@triton.jit
def group_count(pixels, TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the number of elements of each group: ``[padded_groups]``."""
    group_pixels = 1 if TILE.batch_rows else pixels
    return tl.full([TILE.padded_groups], group_pixels, dtype) * TILE.group_channels
