"""Which dimensions of a tensor are cut into tiles.

A dimension is the product of its factors, outermost first: numbers, and spatial axes that are cut.
8 heads and H·W tokens in one dimension are ``(8, Axis(0, ...), Axis(1, ...))``, a size of 1 is
``()``. All tiles have the same layout.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class NotExactError(RuntimeError):
    """An operation needs pixels of other tiles, or is not known not to."""


class Axis(NamedTuple):
    """A spatial axis that is cut: its number in the grid, and the sizes of all tiles along it.

    ``padding`` says how many of the first tile's and of the last tile's pixels F.pad has added.
    """

    number: int
    sizes: tuple[int, ...]
    padding: tuple[int, int] = (0, 0)

    @property
    def edges(self) -> list[int]:
        """Where each tile begins, and where the last one ends."""
        return [0, *itertools.accumulate(self.sizes)]


Dim = tuple[int | Axis, ...]
Layout = tuple[Dim, ...]


def whole(size: int) -> Dim:
    """A dimension of which every tile has all."""
    return () if size == 1 else (size,)


def is_cut(dim: Dim) -> bool:
    """Whether tiles have parts of it."""
    return any(isinstance(factor, Axis) for factor in dim)


def scaled(axis: Axis, factor: int, divisor: int = 1) -> Axis:
    """Return the axis with ``factor`` pixels in place of each ``divisor``.

    ValueError if a tile has a part of these.
    """
    values = [value * factor for value in (*axis.sizes, *axis.padding)]
    if any(value % divisor for value in values):
        raise ValueError(f"tiles of {axis.sizes} pixels have parts of blocks of {divisor}")
    *sizes, first, last = (value // divisor for value in values)
    return Axis(axis.number, tuple(sizes), (first, last))


def joined(factors: Iterable[int | Axis]) -> Dim:
    """Return the factors as one dimension, numbers multiplied into what is before them."""
    dim: list[int | Axis] = []
    for factor in factors:
        if dim and isinstance(factor, int):
            last = dim[-1]
            dim[-1] = last * factor if isinstance(last, int) else scaled(last, factor)
        elif factor != 1:
            dim.append(factor)
    return tuple(dim)


def size_of(dim: Dim) -> int:
    """In the whole."""
    return math.prod(factor if isinstance(factor, int) else sum(factor.sizes) for factor in dim)


def own_size(dim: Dim, coords: Sequence[int]) -> int:
    """In the tile at ``coords``."""
    sizes = (
        factor if isinstance(factor, int) else factor.sizes[coords[factor.number]] for factor in dim
    )
    return math.prod(sizes)


def reshaped(layout: Layout, sizes: Sequence[int]) -> Layout:
    """Return the layout after ``reshape(sizes)`` of the whole; ValueError if that mixes tiles."""
    before = tuple(map(size_of, layout))
    rest = list(joined(itertools.chain.from_iterable(layout)))
    missing = math.prod(before) // max(1, math.prod(size for size in sizes if size != -1))
    dims = []
    for wanted in sizes:
        size = missing if wanted == -1 else wanted
        dim: list[int | Axis] = []
        while size != 1:
            factor = rest.pop(0)  # an IndexError is for sizes that do not fit the whole either
            here = size_of((factor,))
            if size % here == 0:
                size //= here
            elif here % size == 0:
                rest.insert(0, here // size)
                factor = size if isinstance(factor, int) else scaled(factor, 1, here // size)
                size = 1
            else:
                raise ValueError(f"from {before} to {tuple(sizes)} mixes pixels of several tiles")
            dim.append(factor)
        dims.append(joined(dim))
    return tuple(dims)
