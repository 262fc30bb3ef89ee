"""Layouts: how the dimensions of a tensor are cut into tiles.

A dimension is the product of its factors, outermost first. A factor is a number or a cut spatial
axis. 8 heads and H·W tokens in one dimension are ``(8, Axis(0, ...), Axis(1, ...))``; a size of 1
is ``()``. All tiles have the same layout.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class NotExactError(RuntimeError):
    """Error of an operation that needs pixels of other tiles, or is not known to do without."""


class Axis(NamedTuple):
    """A cut spatial axis: its number in the grid, and the sizes of all tiles along it.

    ``padding`` counts the pixels that F.pad has added to the first tile and to the last tile.
    """

    number: int
    sizes: tuple[int, ...]
    padding: tuple[int, int] = (0, 0)

    @property
    def edges(self) -> list[int]:
        """Return where each tile begins, and where the last one ends."""
        return [0, *itertools.accumulate(self.sizes)]


Dim = tuple[int | Axis, ...]
Layout = tuple[Dim, ...]


def whole(size: int) -> Dim:
    """Return the uncut dimension of this size."""
    return () if size == 1 else (size,)


def is_cut(dim: Dim) -> bool:
    """Return whether the dimension is cut."""
    return any(isinstance(factor, Axis) for factor in dim)


def scaled(axis: Axis, factor: int, divisor: int = 1) -> Axis:
    """Return the axis with ``factor`` pixels in place of each ``divisor`` pixels.

    Raises:
        ValueError: a tile has only a part of such a block of ``divisor`` pixels.
    """
    values = [value * factor for value in (*axis.sizes, *axis.padding)]
    if any(value % divisor for value in values):
        raise ValueError(f"tiles of {axis.sizes} pixels have parts of blocks of {divisor}")
    *sizes, first, last = (value // divisor for value in values)
    return Axis(axis.number, tuple(sizes), (first, last))


def joined(factors: Iterable[int | Axis]) -> Dim:
    """Return the factors as one dimension; a number is multiplied into the factor before it."""
    dim: list[int | Axis] = []
    for factor in factors:
        if dim and isinstance(factor, int):
            last = dim[-1]
            dim[-1] = last * factor if isinstance(last, int) else scaled(last, factor)
        elif factor != 1:
            dim.append(factor)
    return tuple(dim)


def size_of(dim: Dim) -> int:
    """Return the dimension's size in the whole tensor."""
    return math.prod(factor if isinstance(factor, int) else sum(factor.sizes) for factor in dim)


def own_size(dim: Dim, coords: Sequence[int]) -> int:
    """Return the dimension's size in the tile at ``coords``."""
    sizes = (
        factor if isinstance(factor, int) else factor.sizes[coords[factor.number]] for factor in dim
    )
    return math.prod(sizes)


def reshaped(layout: Layout, sizes: Sequence[int]) -> Layout:
    """Return the layout after ``reshape(sizes)`` of the whole tensor.

    Raises:
        ValueError: the reshape mixes pixels of several tiles.
    """
    before = tuple(map(size_of, layout))
    factors = list(joined(itertools.chain.from_iterable(layout)))
    inferred = math.prod(before) // max(1, math.prod(size for size in sizes if size != -1))
    dims = []
    for requested in sizes:
        size = inferred if requested == -1 else requested
        dim: list[int | Axis] = []
        while size != 1:
            factor = factors.pop(0)  # IndexError: the sizes do not fit the whole tensor either
            factor_size = size_of((factor,))
            if size % factor_size == 0:
                size //= factor_size
            elif factor_size % size == 0:
                factors.insert(0, factor_size // size)
                factor = size if isinstance(factor, int) else scaled(factor, 1, factor_size // size)
                size = 1
            else:
                raise ValueError(f"from {before} to {tuple(sizes)} mixes pixels of several tiles")
            dim.append(factor)
        dims.append(joined(dim))
    return tuple(dims)
