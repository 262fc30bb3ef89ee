"""The constants of a call. Its tensors are ``reference.Operands``."""

from typing import NamedTuple

import torch

from triton_gn.ops.settings import Settings


class Call(NamedTuple):
    """Constants that travel together from dispatch to the launch cache."""

    groups: int
    eps: float
    activation: str
    y_dtype: torch.dtype
    settings: Settings  # of the forward: a backward runs in a thread of its own
