"""Moments of groups (count, mean, sum of squared deviations), and how they merge.

The mean is a pair, ``mean + mean_lo``: one float32 cannot hold a mean of 1e4 to the precision that
a deviation of 0.1 asks for. docs/math.md derives the formulas.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .reduce import as_tile_operand, broadcast_channels, broadcast_groups, free_layout, group_sums
from .tile import (
    converted,
    groups_of,
    load_channels,
    zero_beyond_channels,
    zero_beyond_pixels,
)

# mean, mean_lo and rstd of each group, as saved for the backward
NUM_STATS = tl.constexpr(3)


class Moments(NamedTuple):
    """Moments of each group: ``[padded_groups]``, or ``[padded_groups, partials]``."""

    count: tl.tensor
    mean: tl.tensor
    mean_lo: tl.tensor
    m2: tl.tensor  # sum of squared deviations from the mean


class Deviations(NamedTuple):
    """Accumulators of deviations from a reference, in the shape of a fragment."""

    sums: tl.tensor
    squares: tl.tensor


class Stats(NamedTuple):
    """Statistics that normalise an element; they broadcast against a fragment."""

    mean: tl.tensor
    mean_lo: tl.tensor
    rstd: tl.tensor


@triton.jit
def divide(a, b):
    """Divide, correctly rounded; ``/`` on float32 is an approximation on the GPU."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def rounded(product):
    """Round a product now: adding 0 blocks FMA contraction.

    Otherwise threads would subtract slightly different means.
    """
    return product + 0.0


@triton.jit
def _inverse(n):
    return divide(tl.full(n.shape, 1.0, n.dtype), n)


@triton.jit
def tile_count(region, TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the number of elements that each group has in the region."""
    if TILE.groups == 1:
        per_row = region.block.cols.to(dtype)
    else:
        per_row = tl.full([], TILE.group_channels, dtype)
    rows = 1 if TILE.batch_rows else region.block.rows
    return rows * per_row


@triton.jit
def _two_sum(a, b):
    """Return ``a + b`` as a pair (hi, lo): Knuth's two-sum."""
    hi = a + b
    b_rounded = hi - a
    return hi, (a - (hi - b_rounded)) + (b - b_rounded)


@triton.jit
def centre_of(
    pre_add, mean, mean_lo, region, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Return the pair to subtract from x, ``mean + mean_lo - pre_add``.

    It is per channel, or per group without pre_add.
    """
    if pre_add is not None:
        # x + pre_add could not hold what mean_lo adds; the sum of mean and pre_add is again a pair
        added = as_tile_operand(load_channels(pre_add, region, c, TILE, dtype), TILE)
        mean, mean_error = _two_sum(mean, -added)
        mean_lo += mean_error
    # x is 0 where there is no channel, so its deviation must be 0 too
    return zero_beyond_channels(mean, region, c, TILE), mean_lo


@triton.jit
def centred(x, centre, region, p: tl.constexpr, TILE: tl.constexpr):
    """Subtract the high part of the centre from fragment x of pixel tile ``p``: exact near it."""
    return converted(x, centre.dtype, TILE) - broadcast_channels(centre, region, p, TILE)


@triton.jit
def rough_mean(xs, pre_add, region, TILE: tl.constexpr, dtype: tl.constexpr):
    """Compute the mean of each group of the region, with the errors of plain summation.

    ``xs``: the region's fragments.
    """
    total = tl.zeros([TILE.rows, TILE.cols], dtype)
    for c in tl.static_range(TILE.channel_tiles):
        if pre_add is not None:
            added = as_tile_operand(load_channels(pre_add, region, c, TILE, dtype), TILE)
        for p in tl.static_range(TILE.pixel_tiles):
            x = converted(xs[c * TILE.pixel_tiles + p], dtype, TILE)
            if pre_add is not None:
                x += broadcast_channels(added, region, p, TILE)
                x = zero_beyond_pixels(x, region, p, TILE)
            total += x
    return rounded(group_sums(total, TILE) * _inverse(tile_count(region, TILE, dtype)))


@triton.jit
def zero_acc(TILE: tl.constexpr, dtype: tl.constexpr):
    """Return the empty accumulators of ``add_deviations``."""
    zeros = tl.zeros([TILE.rows, TILE.cols], dtype)
    return Deviations(zeros, zeros)


@triton.jit
def add_deviations(acc, xs, pre_add, reference, region, TILE: tl.constexpr):
    """Add the deviations from ``reference`` ``[padded_groups]``, and their squares, to ``acc``."""
    sums, squares = acc
    dtype: tl.constexpr = reference.dtype
    for c in tl.static_range(TILE.channel_tiles):
        mean = broadcast_groups(reference, TILE)
        centre, centre_lo = centre_of(pre_add, mean, 0.0, region, c, TILE, dtype)
        for p in tl.static_range(TILE.pixel_tiles):
            deviation = centred(xs[c * TILE.pixel_tiles + p], centre, region, p, TILE)
            if pre_add is not None:
                deviation -= broadcast_channels(centre_lo, region, p, TILE)
            deviation = zero_beyond_pixels(deviation, region, p, TILE)
            sums += deviation
            squares += deviation * deviation
    return Deviations(sums, squares)


@triton.jit
def moments_of(deviations, reference, count, TILE: tl.constexpr):
    """Compute moments from the deviations of ``count`` elements of each group."""
    deviation = group_sums(deviations.sums, TILE)
    mean_lo = deviation * _inverse(count)
    m2 = group_sums(deviations.squares, TILE) - mean_lo * deviation
    return Moments(count + tl.zeros([TILE.padded_groups], m2.dtype), reference, mean_lo, m2)


@triton.jit
def tile_moments(xs, pre_add, region, TILE: tl.constexpr, dtype: tl.constexpr):
    """Compute the moments of the region's elements from its fragments ``xs``."""
    reference = rough_mean(xs, pre_add, region, TILE, dtype)
    deviations = add_deviations(zero_acc(TILE, dtype), xs, pre_add, reference, region, TILE)
    return moments_of(deviations, reference, tile_count(region, TILE, dtype), TILE)


@triton.jit
def empty_moments(TILE: tl.constexpr, dtype: tl.constexpr):
    """Return moments of no elements."""
    zeros = tl.zeros([TILE.padded_groups], dtype)
    return Moments(zeros, zeros, zeros, zeros)


@triton.jit
def combine(a, b):
    """Merge the moments of two disjoint parts, of which either may be empty."""
    count = a.count + b.count
    # relative to a mean that exists: from 0, a difference would not hold the low part of the pair
    reference = tl.where(a.count > 0, a.mean, b.mean)
    reference_lo = tl.where(a.count > 0, a.mean_lo, b.mean_lo)
    difference = (b.mean - reference) + (b.mean_lo - reference_lo)
    step = difference * divide(b.count, tl.maximum(count, 1.0))
    mean, mean_lo = _two_sum(reference, reference_lo + step)
    m2 = a.m2 + b.m2 + difference * step * a.count
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def combine_all(partials):
    """Merge all partial moments of each group, to ``[padded_groups]``.

    The merge is flat and in a fixed order, relative to the rounded mean. Partials of count 0 do not
    matter.
    """
    present = partials.count > 0
    count = tl.sum(partials.count, axis=1)
    weight = partials.count * _inverse(tl.maximum(count, 1.0))[:, None]
    reference = tl.sum(rounded(tl.where(present, partials.mean, 0.0) * weight), axis=1)
    difference = (partials.mean - reference[:, None]) + partials.mean_lo
    difference = tl.where(present, difference, 0.0)
    step = tl.sum(difference * weight, axis=1)
    deviation = difference - step[:, None]
    m2 = tl.where(present, partials.m2 + partials.count * (deviation * deviation), 0.0)
    mean, mean_lo = _two_sum(reference, step)
    return Moments(count, mean, mean_lo, tl.sum(m2, axis=1))


@triton.jit
def rstd_of(moments, eps):
    """Compute ``1 / sqrt(m2 / count + eps)``, correctly rounded."""
    # m2 of a constant group can round to just below 0; a NaN stays one
    m2 = tl.where(moments.m2 < 0, 0.0, moments.m2)
    variance = divide(m2, tl.maximum(moments.count, 1.0))
    variance += tl.full(variance.shape, eps, variance.dtype)
    one = tl.full(variance.shape, 1.0, variance.dtype)
    if variance.dtype == tl.float64:
        return one / tl.sqrt(variance)
    else:
        return tl.div_rn(one, tl.sqrt_rn(variance))


@triton.jit
def broadcast_stats(mean, mean_lo, rstd, TILE: tl.constexpr):
    """Make per-group statistics broadcast against a fragment."""
    return Stats(
        broadcast_groups(mean, TILE), broadcast_groups(mean_lo, TILE), broadcast_groups(rstd, TILE)
    )


@triton.jit
def store_stats(ptr, moments, rstd, region, TILE: tl.constexpr):
    """Store mean, mean_lo and rstd of the region's groups to ``ptr`` (N, G, 3)."""
    group, mask = groups_of(region, TILE)
    stats_ptr = ptr + group * NUM_STATS
    tl.store(stats_ptr, moments.mean, mask=mask)
    tl.store(stats_ptr + 1, moments.mean_lo, mask=mask)
    tl.store(stats_ptr + 2, rstd, mask=mask)


@triton.jit
def _load_groups(ptr, mask, TILE: tl.constexpr):
    """Load per-group values ``[padded_groups]``, with 0 where there is no group."""
    return free_layout(tl.load(ptr, mask=mask, other=0.0), TILE.padded_groups, TILE)


@triton.jit
def load_stats(ptr, region, TILE: tl.constexpr):
    """Load the Stats of the region's groups from ``ptr`` (N, G, 3)."""
    group, mask = groups_of(region, TILE)
    stats_ptr = ptr + group * NUM_STATS
    mean = _load_groups(stats_ptr, mask, TILE)
    mean_lo = _load_groups(stats_ptr + 1, mask, TILE)
    rstd = _load_groups(stats_ptr + 2, mask, TILE)
    return broadcast_stats(mean, mean_lo, rstd, TILE)
