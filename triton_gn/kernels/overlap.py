"""Overlap: a launch begins while the one before it ends (programmatic dependent launch)."""

import triton
import triton.language as tl


@triton.jit
def empty_kernel():
    """Nothing: whether Triton can compile and load a kernel shows in it."""


@triton.jit
def take_turns(OVERLAP: tl.constexpr):
    """Let the next launch begin once all programs of this one have, then wait for the one before to
    end and for what it has stored.

    It comes first in a kernel: before it nothing may be read or written that another launch does.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
