"""Count, mean and m2 (sum of squared deviations) of groups, and how they merge.

The mean is a pair, ``mean + mean_lo``: one float32 cannot hold a mean of 1e4 to the precision that
a deviation of 0.1 asks for. docs/math.md derives the formulas.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tile import (
    as_tile_operand,
    broadcast_channels,
    broadcast_groups,
    group_sums,
    groups_of,
    load_channels,
    load_groups,
    unpacked,
    zero_beyond_channels,
    zero_beyond_pixels,
)


class Moments(NamedTuple):
    """Of each group: ``[padded_groups]``, or with one more axis for the parts of a group."""

    count: tl.tensor
    mean: tl.tensor
    mean_lo: tl.tensor
    m2: tl.tensor


class Stats(NamedTuple):
    """What normalises an element, made to broadcast against a fragment."""

    mean: tl.tensor
    mean_lo: tl.tensor
    rstd: tl.tensor


@triton.jit
def divide(a, b):
    """Correctly rounded; ``/`` on float32 is an approximation on the GPU."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def rounded(product):
    """A product as one number. A compiler may fuse it with what it is added to, where it is not
    rounded then; but the mean that a low part belongs to must be one wherever it is used, in all
    threads."""
    return product + 0.0


@triton.jit
def _inverse(n):
    return divide(tl.full(n.shape, 1.0, n.dtype), n)


@triton.jit
def tile_count(program_tile, TILE: tl.constexpr, dtype: tl.constexpr):
    """Elements of each group in the program_tile."""
    if TILE.groups == 1:
        per_row = program_tile.cols.to(dtype)
    else:
        per_row = tl.full([], TILE.group_channels, dtype)
    rows = 1 if TILE.batch_rows else program_tile.rows
    return rows * per_row


@triton.jit
def _pair(reference, difference):
    """``reference + difference`` as a pair (Knuth's two-sum)."""
    hi = reference + difference
    rest = hi - reference
    return hi, (reference - (hi - rest)) + (difference - rest)


@triton.jit
def centre_of(
    pre_add, mean, mean_lo, program_tile, c: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """The pair that x loses, ``mean + mean_lo - pre_add``; per channel, or per group without
    pre_add."""
    if pre_add is not None:
        # x + pre_add would not hold what mean_lo adds; the sum of these is again a pair
        added = as_tile_operand(load_channels(pre_add, program_tile, c, TILE, dtype), TILE)
        mean, rest = _pair(mean, -added)
        mean_lo += rest
    # x is 0 where there is no channel: so is what it is from this
    return zero_beyond_channels(mean, program_tile, c, TILE), mean_lo


@triton.jit
def centred(x, centre, program_tile, p: tl.constexpr, TILE: tl.constexpr):
    """The fragment x of pixel tile ``p`` without the high part of its centre: exact near it."""
    return unpacked(x, centre.dtype, TILE) - broadcast_channels(centre, program_tile, p, TILE)


@triton.jit
def rough_mean(xs, pre_add, program_tile, TILE: tl.constexpr, dtype: tl.constexpr):
    """Mean of each group of the program_tile, which ``xs`` holds as fragments, as it rounds."""
    total = tl.zeros([TILE.rows, TILE.cols], dtype)
    for c in tl.static_range(TILE.channel_tiles):
        if pre_add is not None:
            added = as_tile_operand(load_channels(pre_add, program_tile, c, TILE, dtype), TILE)
        for p in tl.static_range(TILE.pixel_tiles):
            x = unpacked(xs[c * TILE.pixel_tiles + p], dtype, TILE)
            if pre_add is not None:
                x = zero_beyond_pixels(
                    x + broadcast_channels(added, program_tile, p, TILE), program_tile, p, TILE
                )
            total += x
    return rounded(group_sums(total, TILE) * _inverse(tile_count(program_tile, TILE, dtype)))


@triton.jit
def zero_acc(TILE: tl.constexpr, dtype: tl.constexpr):
    return tl.zeros([TILE.rows, TILE.cols], dtype), tl.zeros([TILE.rows, TILE.cols], dtype)


@triton.jit
def add_deviations(deviations, xs, pre_add, reference, program_tile, TILE: tl.constexpr):
    """Add those from ``reference`` ``[padded_groups]``, and their squares, to a pair of accumulators
    of the shape of a fragment."""
    sums, squares = deviations
    dtype: tl.constexpr = reference.dtype
    for c in tl.static_range(TILE.channel_tiles):
        centre, rest = centre_of(
            pre_add, broadcast_groups(reference, TILE), 0.0, program_tile, c, TILE, dtype
        )
        for p in tl.static_range(TILE.pixel_tiles):
            deviation = centred(xs[c * TILE.pixel_tiles + p], centre, program_tile, p, TILE)
            if pre_add is not None:
                deviation -= broadcast_channels(rest, program_tile, p, TILE)
            deviation = zero_beyond_pixels(deviation, program_tile, p, TILE)
            sums += deviation
            squares += deviation * deviation
    return sums, squares


@triton.jit
def moments_of(deviations, reference, count, TILE: tl.constexpr):
    """Moments of ``count`` elements of each group from all their deviations from ``reference``."""
    deviation = group_sums(deviations[0], TILE)
    mean_lo = deviation * _inverse(count)
    m2 = group_sums(deviations[1], TILE) - mean_lo * deviation
    return Moments(count + tl.zeros([TILE.padded_groups], m2.dtype), reference, mean_lo, m2)


@triton.jit
def tile_moments(xs, pre_add, program_tile, TILE: tl.constexpr, dtype: tl.constexpr):
    """Moments of the program_tile's elements, which ``xs`` holds as fragments."""
    reference = rough_mean(xs, pre_add, program_tile, TILE, dtype)
    deviations = zero_acc(TILE, dtype)
    deviations = add_deviations(deviations, xs, pre_add, reference, program_tile, TILE)
    return moments_of(deviations, reference, tile_count(program_tile, TILE, dtype), TILE)


@triton.jit
def combine(a, b):
    """Moments of two disjoint parts; either may be empty."""
    count = a.count + b.count
    # relative to a mean that exists: from 0, a difference would not hold the low part of the pair
    reference = tl.where(a.count > 0, a.mean, b.mean)
    reference_lo = tl.where(a.count > 0, a.mean_lo, b.mean_lo)
    difference = (b.mean - reference) + (b.mean_lo - reference_lo)
    step = difference * divide(b.count, tl.maximum(count, 1.0))
    mean, mean_lo = _pair(reference, reference_lo + step)
    m2 = a.m2 + b.m2 + difference * step * a.count
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def combine_all(parts):
    """Moments of all parts of each group at once: ``[padded_groups, parts]`` to ``[padded_groups]``.

    Flat and in a fixed order, relative to their mean as it rounds; those of count 0 do not matter.
    """
    there = parts.count > 0
    count = tl.sum(parts.count, axis=1)
    share = _inverse(tl.maximum(count, 1.0))
    weight = parts.count * share[:, None]
    reference = tl.sum(rounded(tl.where(there, parts.mean, 0.0) * weight), axis=1)
    difference = tl.where(there, (parts.mean - reference[:, None]) + parts.mean_lo, 0.0)
    step = tl.sum(difference * weight, axis=1)
    rest = difference - step[:, None]
    m2 = tl.sum(tl.where(there, parts.m2 + parts.count * (rest * rest), 0.0), axis=1)
    mean, mean_lo = _pair(reference, step)
    return Moments(count, mean, mean_lo, m2)


@triton.jit
def rstd_of(moments, eps):
    """``1 / sqrt(m2 / count + eps)``, correctly rounded."""
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
def spread_stats(moments, rstd, TILE: tl.constexpr):
    return Stats(
        broadcast_groups(moments.mean, TILE),
        broadcast_groups(moments.mean_lo, TILE),
        broadcast_groups(rstd, TILE),
    )


@triton.jit
def store_stats(ptr, moments, rstd, program_tile, groups, TILE: tl.constexpr):
    """To ``ptr`` (N, G, 3): mean, mean_lo, rstd."""
    index, mask = groups_of(program_tile, groups, TILE)
    tl.store(ptr + index * 3, moments.mean, mask=mask)
    tl.store(ptr + index * 3 + 1, moments.mean_lo, mask=mask)
    tl.store(ptr + index * 3 + 2, rstd, mask=mask)


@triton.jit
def load_stats(ptr, program_tile, groups, TILE: tl.constexpr):
    index, mask = groups_of(program_tile, groups, TILE)
    mean = load_groups(ptr + index * 3, mask, TILE)
    mean_lo = load_groups(ptr + index * 3 + 1, mask, TILE)
    rstd = load_groups(ptr + index * 3 + 2, mask, TILE)
    return Stats(
        broadcast_groups(mean, TILE), broadcast_groups(mean_lo, TILE), broadcast_groups(rstd, TILE)
    )
