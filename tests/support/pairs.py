"""Test cases that combine parameters without their full product."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def each_pair(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by ``names`` so that any two values of different parameters meet."""
    return pytest.mark.parametrize(names.split(), pairwise(*values), ids=_id)


def _id(value: object) -> str:
    if isinstance(value, tuple) and all(isinstance(part, str) for part in value):
        return "+".join(value) or "alone"
    return getattr(value, "__name__", str(value)).removeprefix("torch.").replace(" ", "")


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose cases in which any two values of different parameters meet at least once.

    Most faults depend on one parameter or on two. The choice is greedy and always the same.
    """
    columns = range(len(parameters))
    # a pair is ((column, index of its value), the same of a later column); a dict keeps its order
    uncovered = dict.fromkeys(
        ((i, a), (j, b))
        for i, j in itertools.combinations(columns, 2)
        for a in range(len(parameters[i]))
        for b in range(len(parameters[j]))
    )

    def gain(case: dict[int, int], column: int, value: int) -> int:
        pairs = (tuple(sorted([item, (column, value)])) for item in case.items())
        return sum(pair in uncovered for pair in pairs)

    cases = []
    while uncovered:
        case = dict(next(iter(uncovered)))
        for column in columns:
            if column not in case:
                values = range(len(parameters[column]))
                case[column] = max(values, key=lambda value: gain(case, column, value))
        for pair in itertools.combinations(sorted(case.items()), 2):
            uncovered.pop(pair, None)
        cases.append(tuple(parameters[column][case[column]] for column in columns))
    return cases
