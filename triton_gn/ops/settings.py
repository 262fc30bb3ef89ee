"""Settings of a thread: backend, autocast policy, batch invariance, plan override."""

import functools
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

BACKENDS = ("auto", "triton", "torch")
# Triton reads it when a kernel is defined; set later, it has no effect
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
AUTOCAST_POLICIES = ("torch", "keep")


@dataclass(frozen=True)
class Settings:
    backend: str = "auto"
    autocast_policy: str = "torch"
    batch_invariant: bool = False
    plan_override: tuple[tuple[str, Any], ...] = ()


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{source}: the backend must be one of {', '.join(BACKENDS)}; got {name!r}."
        )
    return name


class _ThreadSettings(threading.local):
    """The current settings; each thread starts from the environment."""

    def __init__(self) -> None:
        name = os.environ.get("TRITON_GN_BACKEND", "auto")
        self.current = Settings(backend=_checked_backend(name, "TRITON_GN_BACKEND"))


_thread = _ThreadSettings()


def current() -> Settings:
    return _thread.current


@functools.cache
def to_text(settings: Settings) -> str:
    """Encode settings as an operator's argument; ``from_text`` decodes them."""
    return json.dumps(asdict(settings))


@functools.cache
def from_text(text: str) -> Settings:
    fields = json.loads(text)
    override = tuple((name, value) for name, value in fields.pop("plan_override"))
    return Settings(**fields, plan_override=override)


def when_compiled() -> tuple[str, str, str]:
    """Return backend, autocast policy and all settings as text, for torch.compile.

    It cannot look into a thread's state, so it keeps the settings of the time when it traces.
    """
    settings = current()
    return settings.backend, settings.autocast_policy, to_text(settings)


# torch.compiler.assume_constant_result, without its loading of the compiler and of Triton
when_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Setting:
    """A setting that has taken effect; as a context manager it restores the old one on exit."""

    def __init__(self, changes: Mapping[str, Any]) -> None:
        before = _thread.current
        self._changes = dict(changes)
        self._before = {name: getattr(before, name) for name in changes}
        self.__enter__()

    def __enter__(self) -> None:
        _thread.current = replace(_thread.current, **self._changes)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _thread.current = replace(_thread.current, **self._before)


def backend(name: str) -> Setting:
    """Choose the path of this thread's calls.

    ``"auto"`` takes the Triton kernels where they can run, else PyTorch; ``"triton"`` raises
    instead of falling back; ``"torch"`` never takes the kernels. The environment variable
    ``TRITON_GN_BACKEND`` sets what each thread starts with. As a context manager
    (``with triton_gn.backend("torch"): ...``) the old choice returns on exit.

    Raises:
        ValueError: another name.
    """
    return Setting({"backend": _checked_backend(name, "backend")})


def autocast_policy(name: str) -> Setting:
    """Choose what this thread's calls do under CUDA autocast.

    ``"torch"`` gives float32, as PyTorch's group_norm does there; ``"keep"`` the input's dtype.
    The arithmetic is float32 either way. As a context manager the old choice returns on exit.

    Raises:
        ValueError: another name.
    """
    if name not in AUTOCAST_POLICIES:
        raise ValueError(
            f"autocast_policy: the policy must be one of {', '.join(AUTOCAST_POLICIES)}; "
            f"got {name!r}."
        )
    return Setting({"autocast_policy": name})


def batch_invariant(enabled: bool = True) -> Setting:
    """Make this thread's plans independent of the batch size.

    A sample then has the same bits alone as inside any batch, at some cost in speed for small
    batches. As a context manager, the old choice returns on exit.
    """
    return Setting({"batch_invariant": bool(enabled)})


def plan_override(**fields: Any) -> Setting:
    """Fix parts of the plan for this thread's calls, for tests and the curious.

    Fields: ``strategy`` ("resident", "split" or "pipelined"), ``groups`` (whole groups per program,
    channels-last), ``rows`` and ``cols`` (a fragment), ``num_warps``; not resident,
    ``pixel_tiles`` (fragments held at a time) and ``splits``; pipelined only, ``blocks`` (of groups
    that go through the pipeline together) and ``persistent_programs``. Unspecified fields keep the
    planner's choice; call without fields to clear the override. A plan that cannot run raises
    ValueError at the call. As a context manager, the old override returns on exit.

    Raises:
        TypeError: an unknown field.
    """
    from triton_gn.plan import FIELDS

    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise TypeError(
            f"plan_override: unknown field {', '.join(unknown)}; fields are {', '.join(FIELDS)}."
        )
    return Setting({"plan_override": tuple(sorted(fields.items()))})
