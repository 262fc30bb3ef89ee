"""Find hooks around a module's forward, such as those that load its parameters for one call."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn


def enter(self: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a module's forward from a frame that ``running_hook`` recognises."""
    return forward(*args, **kwargs)


def running_hook() -> str | None:
    """Return the name of the hook that is running; None if no hook is.

    A hook is any code that runs in a module's call outside of its class's own forward.
    """
    frame: FrameType | None = sys._getframe()
    frames: list[FrameType] = []
    while frame and frame.f_code not in (nn.Module._call_impl.__code__, enter.__code__):
        frames.insert(0, frame)
        frame = frame.f_back
    own_code = getattr(type(frame.f_locals["self"]).forward, "__code__", None) if frame else None
    if own_code is None or any(frame.f_code is own_code for frame in frames):
        return None
    libraries = {"torch", "triton_gn"}
    names = []
    for frame in frames:
        if frame.f_globals["__name__"].split(".")[0] not in libraries:
            names.append(frame.f_code.co_qualname)
            owner = frame.f_locals.get("self")
            if owner is not None and not isinstance(owner, nn.Module):
                return f"{type(owner).__name__}.{frame.f_code.co_name}"
    return names[0] if names else None
