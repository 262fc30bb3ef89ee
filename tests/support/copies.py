"""Ways to copy a module."""

import io
from typing import TypeVar

import torch
from torch import nn

_M = TypeVar("_M", bound=nn.Module)


def through_file(model: _M) -> _M:
    """Save a module, and load it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: _M = torch.load(file, weights_only=False)
    return loaded
