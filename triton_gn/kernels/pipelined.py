"""Pipelined: split in one launch. The second pass over a stage follows the first one so soon that
L2 still holds what the first one read.

A stage is a few adjacent groups of a sample. Programs take tickets: the first passes of
``prefetch_distance`` stages, then in turn the second pass of one stage and the first pass of the
next. Each pass has ``work_items`` tickets. A second pass waits until all first passes of its stage
are over. Tickets go out in order, so whoever holds an earlier one is running and never waits for a
later one: whatever the grid, there is no deadlock.
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


class Pipeline(NamedTuple):
    """Stages, and the order in which they are worked on."""

    # zeros at first: tickets that are out, then finished first passes of each stage
    counters_ptr: tl.tensor
    stages: tl.tensor  # of the whole batch
    stages_per_sample: tl.tensor
    work_items: tl.tensor  # splits of a stage, each worked on by one program
    prefetch_distance: tl.tensor  # stages that the first pass is ahead, 1 to ``stages``


@triton.jit
def _stage_of(ticket, pipeline):
    """Return the stage that a ticket is for, and whether it is for the first pass."""
    stages, distance = pipeline.stages, pipeline.prefetch_distance
    phase = ticket // pipeline.work_items
    turn = phase - distance
    in_turn = (turn >= 0) & (turn < 2 * (stages - distance))
    is_first = (turn < 0) | (in_turn & (turn % 2 == 1))
    # before and after the turns, only first or only second passes go out
    outside = tl.where(turn < 0, phase, phase - stages)
    return tl.where(in_turn, turn // 2 + tl.where(is_first, distance, 0), outside), is_first


@triton.jit
def _program_of(stage, work_item, pipeline, splits, TILE: tl.constexpr):
    """Return the number that ``split`` gives the program of a work item."""
    rows = splits if TILE.channels_last else 1  # channels-last, the splits of a stage lie apart
    in_row = pipeline.work_items // rows
    row = stage // pipeline.stages_per_sample * rows + work_item // in_row
    column = stage % pipeline.stages_per_sample
    return (row * pipeline.stages_per_sample + column) * in_row + work_item % in_row


@triton.jit
def _take_ticket(pipeline):
    return tl.atomic_add(pipeline.counters_ptr, 1, sem="relaxed")


@triton.jit
def _signal(pipeline, stage):
    """Count a first pass of the stage as finished, after what it has stored."""
    tl.debug_barrier()
    tl.atomic_add(pipeline.counters_ptr + 1 + stage, 1, sem="release")


@triton.jit
def _wait(pipeline, stage):
    """Wait until the first passes of all work items of the stage are finished."""
    finished_ptr = pipeline.counters_ptr + 1 + stage
    while tl.atomic_add(finished_ptr, 0, sem="acquire") < pipeline.work_items:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def group_norm_forward_pipelined_kernel(
    inputs, partials_ptr, y_ptr, stats_ptr, pipeline, groups, pixels, row_vecs, splits, split_vecs,
    num_partials, eps: tl.float64, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Any number of programs, each with one work item at a time.

    Reads x twice, residual once unless None, and ``affine_params``. Writes partials
    (N, G, 4, num_partials), y once, and stats (N, G, 3) unless None.
    """
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    ticket = _take_ticket(pipeline)
    while ticket < 2 * pipeline.stages * pipeline.work_items:
        stage, is_first = _stage_of(ticket, pipeline)
        pid = _program_of(stage, ticket % pipeline.work_items, pipeline, splits, TILE)
        if is_first:
            compute_partial_moments(
                pid, inputs.x_ptr, inputs.affine_params, partials_ptr, shape, TILE, "evict_last"
            )
            _signal(pipeline, stage)
        else:
            _wait(pipeline, stage)
            apply_moments(
                pid, inputs, partials_ptr, y_ptr, stats_ptr, shape, eps, TILE, ACTIVATION,
                "evict_first",
            )  # fmt: skip
        ticket = _take_ticket(pipeline)


@triton.jit(do_not_specialize=SIZES)
def group_norm_backward_pipelined_kernel(
    inputs, outputs, partials_ptr, pipeline, groups, pixels, row_vecs, splits, split_vecs,
    num_partials, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Any number of programs, each with one work item at a time.

    Reads x and, unless None, dy and residual twice, ``affine_params`` and stats (N, G, 3). Writes
    partials (N, G, 2, num_partials), dx and dresidual once, and the splits' rows of each of
    ``grads`` (N * splits, C), each unless None.
    """
    shape = SplitShape(groups, pixels, row_vecs, splits, split_vecs, num_partials)
    ticket = _take_ticket(pipeline)
    while ticket < 2 * pipeline.stages * pipeline.work_items:
        stage, is_first = _stage_of(ticket, pipeline)
        pid = _program_of(stage, ticket % pipeline.work_items, pipeline, splits, TILE)
        if is_first:
            compute_partial_sums(
                pid, inputs, outputs, partials_ptr, shape, TILE, ACTIVATION, "evict_last"
            )
            _signal(pipeline, stage)
        else:
            _wait(pipeline, stage)
            apply_sums(pid, inputs, outputs, partials_ptr, shape, TILE, ACTIVATION, "evict_first")
        ticket = _take_ticket(pipeline)
