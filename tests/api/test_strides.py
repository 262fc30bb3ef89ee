"""Operands of any strides on PyTorch's path."""

from hypothesis import given, settings

from tests.support import strides


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=strides.problems())
def test_strides_of_no_operand_matter(problem: strides.Problem) -> None:
    strides.check(problem)
