"""State that a model keeps between calls: in lists and dicts of its arguments, or in attributes."""

import copy
import itertools
from collections import deque
from typing import Any

from torch import nn

_OF_EVERY_MODULE = {*vars(nn.Module()), "forward"}


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return the modules' attributes by path, without parameters, buffers and modules."""
    return {
        f"{path}.{name}".lstrip("."): copy.copy(value) if type(value) in (list, dict) else value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal; False where they cannot be compared."""
    try:
        return a is b or bool(a == b)
    except Exception:
        return False


def write_back(old: Any, new: Any) -> Any:
    """Update the caller's nested lists and dicts from their copies, and return the result."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = {key: write_back(old.get(key), part) for key, part in new.items()}
        old.clear()
        old.update(parts)
    elif isinstance(old, list | deque) and isinstance(new, list | deque):
        pairs = itertools.zip_longest(list(old)[: len(new)], new)
        values = [write_back(old_part, part) for old_part, part in pairs]
        old.clear()
        old.extend(values)
    else:
        return new
    return old
