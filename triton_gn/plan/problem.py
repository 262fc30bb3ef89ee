"""Describe one GroupNorm launch without its tensors."""

import math
from dataclasses import dataclass

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ACCESS_BYTES = 16  # the widest load and store of one thread


@dataclass(frozen=True)
class Problem:
    """One GroupNorm launch, described without its tensors.

    ``pixels`` is the product of the spatial sizes, ``dtype`` the input's. ``channels_last`` means
    channels innermost in memory, in any rank. ``pre_add`` and ``residual`` say whether the launch
    reads one. ``per_sample`` matters if a sample is one pixel: it says that scale, shift or pre_add
    differ by sample, so that a program cannot take several samples.
    """

    direction: str  # "forward" or "backward"
    n: int
    channels: int
    groups: int
    pixels: int
    dtype: str
    channels_last: bool
    activation: str = "none"
    pre_add: bool = False
    residual: bool = False
    per_sample: bool = False

    @property
    def fused(self) -> tuple[str, ...]:
        """Operands that a workload must fuse to have this problem."""
        names = [name for name in ("pre_add", "residual") if getattr(self, name)]
        return tuple(["scale"] * (self.per_sample and not self.pre_add) + names)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_elements(self) -> int:
        return self.group_channels * self.pixels

    @property
    def vec(self) -> int:
        """Elements per memory access, as many as the alignment of every group allows."""
        if self.channels_last:
            unit = self.channels
        elif self.itemsize < 8 and self.pixels * ACCESS_BYTES < 2**32:
            unit = self.group_elements
        else:
            # one channel per row: float64 leaves no registers for more, and kernels index the
            # elements of a row with 32 bits
            unit = self.pixels
        return math.gcd(unit, ACCESS_BYTES // self.itemsize)

    def access_bytes(self, groups: int) -> int:
        """Return the bytes of the widest access that blocks of ``groups`` whole groups allow."""
        elements = self.vec
        if self.channels_last:
            elements = math.gcd(elements, groups * self.group_channels)
        return elements * self.itemsize

    @property
    def channels_per_row(self) -> int:
        """Channels that fill whole vectors; 1 if channels-last."""
        return 1 if self.channels_last else self.vec // math.gcd(self.pixels, self.vec)

    @property
    def row_vecs(self) -> int:
        """Length of a memory row (kernels/tile.py) in vectors."""
        row = self.channels if self.channels_last else self.pixels * self.channels_per_row
        return row // self.vec
