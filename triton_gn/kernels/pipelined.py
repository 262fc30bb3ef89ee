"""Pipelined: split in one launch, where the second pass of a unit of groups follows the first one
so soon that L2 still holds what was read.

Programs take tickets: the first passes of ``prefetch_distance`` units, then in turn the second pass of one unit
and the first pass of the next, ``items`` tickets for each pass. A second pass waits until all first
passes of its unit are over. Tickets go out in order, so whoever holds an earlier one is running
and never waits for a later one: whatever the grid, nothing can lock up. ``counters``, zeros at
first: tickets that are out, then finished first passes of each unit.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .split import (
    SplitShape,
    apply_moments,
    apply_sums,
    compute_partial_moments,
    compute_partial_sums,
)
from .tile import SIZES


class Units(NamedTuple):
    """What goes through the pipeline: adjacent groups of a sample."""

    units: tl.tensor  # of the whole batch
    in_sample: tl.tensor
    items: tl.tensor  # splits of a unit, each a program's work
    prefetch_distance: tl.tensor  # by how many units the first pass is ahead; 1 to ``units``


@triton.jit
def _phase(ticket, order):
    """Which unit a ticket is for, and whether it is its first pass."""
    phase = ticket // order.items
    turn = phase - order.prefetch_distance
    in_turn = (turn >= 0) & (turn < 2 * (order.units - order.prefetch_distance))
    is_first = (turn < 0) | (in_turn & (turn % 2 == 1))
    unit = tl.where(turn < 0, phase, phase - order.units)
    return tl.where(
        in_turn, turn // 2 + tl.where(is_first, order.prefetch_distance, 0), unit
    ), is_first


@triton.jit
def _program(unit, item, order, splits, TILE: tl.constexpr):
    """The number that ``split`` gives the program of an item."""
    rows = splits if TILE.channels_last else 1  # there the splits of a unit lie apart
    in_row = order.items // rows
    row = unit // order.in_sample * rows + item // in_row
    return (row * order.in_sample + unit % order.in_sample) * in_row + item % in_row


@triton.jit
def _finish(counter_ptr):
    """Tell that an item's first pass is over, what it has stored included."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _wait(counter_ptr, items):
    """Until the first passes of all items of a unit are over."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < items:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_pipelined_kernel(
    x_ptr, residual_ptr, affine_params, partials_ptr, y_ptr, stats_ptr, counters_ptr, order, groups,
    pixels, row_vecs, splits, split_vecs, num_partials, eps: tl.float64, PARTIALS: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Any number of programs.

    Reads x twice, residual once unless None, ``affine_params``; writes partials (N, G, 4, num_partials), y once,
    and stats (N, G, 3) unless None.
    """
    cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < 2 * order.units * order.items:
        unit, is_first = _phase(ticket, order)
        pid = _program(unit, ticket % order.items, order, splits, TILE)
        if is_first:
            compute_partial_moments(
                pid, x_ptr, affine_params, partials_ptr, cut, TILE, "evict_last"
            )
            _finish(counters_ptr + 1 + unit)
        else:
            _wait(counters_ptr + 1 + unit, order.items)
            apply_moments(
                pid, x_ptr, residual_ptr, affine_params, partials_ptr, y_ptr, stats_ptr, cut, eps, PARTIALS,
                TILE, ACTIVATION, "evict_first",
            )  # fmt: skip
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_pipelined_kernel(
    dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dx_ptr, dresidual_ptr, grads,
    counters_ptr, order, groups, pixels, row_vecs, splits, split_vecs, num_partials, PARTIALS: tl.constexpr,
    TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Any number of programs.

    Reads dy, x and, unless None, residual twice, ``affine_params``, stats (N, G, 3). Writes partials
    (N, G, 2, num_partials), dx and dresidual once, and the splits' rows of each of ``grads``
    (N * splits, C); each unless None.
    """
    cut = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    while ticket < 2 * order.units * order.items:
        unit, is_first = _phase(ticket, order)
        pid = _program(unit, ticket % order.items, order, splits, TILE)
        if is_first:
            compute_partial_sums(
                pid, dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dresidual_ptr,
                grads, cut, TILE, ACTIVATION, "evict_last",
            )  # fmt: skip
            _finish(counters_ptr + 1 + unit)
        else:
            _wait(counters_ptr + 1 + unit, order.items)
            apply_sums(
                pid, dy_ptr, x_ptr, residual_ptr, affine_params, stats_ptr, partials_ptr, dx_ptr,
                grads.pre_add, cut, PARTIALS, TILE, ACTIVATION, "evict_first",
            )  # fmt: skip
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
