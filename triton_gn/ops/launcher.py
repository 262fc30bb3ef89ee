"""Calls that are made again and again: planned, described and compiled once, then bound to tensors.

A call is prepared for its *signature*, which is all that its launches depend on but the addresses:
shapes, strides, dtypes and alignment of its tensors, its constants and settings. What a repeated
call costs is this signature, one look-up and one call of Triton's launcher for each launch.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from triton_gn.ops import launches, layout
from triton_gn.ops.device import gpu_of
from triton_gn.ops.launches import Half, Launch, Workspace
from triton_gn.ops.settings import Settings
from triton_gn.plan import Config, Problem, plan
from triton_gn.reference import Operands

Tensors = Sequence[Tensor | None]

_recorded: list["Prepared"] | None = None


@contextmanager
def recording() -> "Iterator[list[Prepared]]":
    """The calls that are made, in all threads, while it is the active context."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


class Prepared:
    """The launches of a call, made on tensors without memory, to be bound to real ones.

    ``templates``: the tensors of the call that the launches' arguments are made of; what else these
    hold must be a ``Workspace``.
    """

    def __init__(
        self,
        problem: Problem,
        config: Config,
        launches: list[Launch],
        templates: Tensors,
        device: torch.device,
    ) -> None:
        self.problem, self.config, self.launches = problem, config, launches
        self._device = device
        places = {id(tensor): i for i, tensor in enumerate(templates) if tensor is not None}
        self._workspaces: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        for tensor in _tensors_in([one.arguments for one in launches]):
            if id(tensor) not in places:
                if not isinstance(tensor, Workspace):
                    raise RuntimeError(
                        "a launch takes a tensor of its call or a Workspace; got one of shape "
                        f"{tuple(tensor.shape)} that is neither, which no call would ever fill."
                    )
                places[id(tensor)] = len(templates) + len(self._workspaces)
                self._workspaces.append((tensor.shape, tensor.stride(), tensor.dtype))
        self._steps = [_Step(one, places, device) for one in launches]

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the tensors' device, whichever device is current."""
        if _recorded is not None:
            _recorded.append(self)
        if self._workspaces:
            tensors += tuple(self._allocated())
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            for step in self._steps:
                step(tensors)
        else:
            with torch.cuda.device(self._device):
                for step in self._steps:
                    step(tensors)

    def _allocated(self) -> Iterator[Tensor]:
        """The workspaces. torch.empty takes the host twice as long as empty_strided."""
        for shape, stride, dtype in self._workspaces:
            workspace = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
            # counters, the only integers, start at zero
            yield workspace if dtype.is_floating_point else workspace.zero_()


class _Step:
    """One launch, its arguments in the kernel's order with gaps for the tensors."""

    def __init__(self, one: Launch, places: Mapping[int, int], device: torch.device) -> None:
        nvidia = device.type == "cuda" and torch.version.hip is None
        arguments = one.arguments_on(nvidia)
        self._kernel, self._grid, self._options = one.kernel, one.grid, one.options(nvidia)
        self._template = [arguments[name] for name in one.kernel.arg_names]
        self._gaps = [
            (position, binder)
            for position, value in enumerate(self._template)
            if (binder := _binder(value, places)) is not None
        ]
        for position, _ in self._gaps:
            self._template[position] = None
        self._index = device.index
        self._launch: Callable[..., None] | None = None

    def __call__(self, tensors: Tensors) -> None:
        arguments = self._template.copy()
        for position, binder in self._gaps:
            arguments[position] = binder(tensors)
        if self._launch is None or _is_observed():
            compiled = self._kernel[(self._grid,)](*arguments, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                self._launch = _launcher(compiled, self._grid, self._index)
        else:
            self._launch(arguments)


def _launcher(compiled: Any, grid: int, index: int) -> Callable[[list[Any]], None]:
    """What Triton does with a compiled kernel, without asking each time which one it is."""
    from triton.runtime import driver

    run, metadata = compiled.run, compiled.packed_metadata
    stream_of = driver.active.get_current_stream

    def start(arguments: list[Any]) -> None:
        # from ``compiled``, to keep it: Triton unloads what nobody has any more
        function = compiled.function
        run(grid, 1, 1, stream_of(index), function, metadata, None, None, None, *arguments)

    return start


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


def _is_observed() -> bool:
    """Whether a profiler wants to hear of launches: Triton's own way tells it."""
    hooks = _hooks()
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    # chains of hooks, unless somebody has put one hook or None in their place
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors_in(one)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _binder(value: Any, places: Mapping[int, int]) -> Callable[[Tensors], Any] | None:
    """How to make an argument out of a call's tensors; None where it has none of them."""
    if isinstance(value, Tensor):
        return itemgetter(places[id(value)])
    if not isinstance(value, tuple):
        return None
    binders = [_binder(one, places) for one in value]
    if not any(binders):
        return None
    gaps = [(position, binder) for position, binder in enumerate(binders) if binder]
    make = type(value)._make  # type: ignore[attr-defined]  # a NamedTuple

    def bind(tensors: Tensors) -> Any:
        fields = list(value)
        for position, binder in gaps:
            fields[position] = binder(tensors)
        return make(fields)

    return bind


# what tells an operand of two calls apart, for the launches: shape, strides, dtype, is it aligned
_Traits = tuple[torch.Size, tuple[int, ...], torch.dtype, bool] | None


def _traits(tensor: Tensor | None) -> _Traits:
    if tensor is None:
        return None
    aligned = not tensor.data_ptr() % layout.ALIGNMENT
    return tensor.shape, tensor.stride(), tensor.dtype, aligned


def _template(traits: _Traits) -> Any:
    if traits is None:
        return None
    shape, stride, dtype, _ = traits
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def forward(
    operands: Operands,
    y: Tensor,
    stats: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    settings: Settings,
    config: Config | None = None,
    moments: Tensor | None = None,
) -> None:
    """Fill y and, unless None, stats (N, G, 3), by ``config`` or the plan under the settings.

    x and the residual are as ``layout`` has made them native; y has the strides of x. ``moments``
    (N, G, 4, parts), under settings of split: normalise by these.
    """
    parts = None if moments is None else moments.shape[3]
    prepared = prepare_forward(
        y.device, tuple(map(_traits, operands)), y.dtype, stats is not None, parts,
        groups, eps, activation, settings.batch_invariant, settings.plan_override, config,
    )  # fmt: skip
    prepared(*operands, y, stats, moments)


@functools.lru_cache(maxsize=4096)
def prepare_forward(
    device: torch.device,
    traits: tuple[_Traits, ...],
    y_dtype: torch.dtype | None,
    with_stats: bool,
    moments_parts: int | None,
    groups: int,
    eps: float,
    activation: str,
    *plan_settings: Any,
) -> Prepared:
    operands = Operands(*map(_template, traits))
    x, n = operands.x, operands.x.shape[0]
    problem = launches.problem_of("forward", operands, groups, activation)
    config = _config(problem, device, *plan_settings)
    y = None if y_dtype is None else layout.empty_like(x, y_dtype)
    stats = launches.statistics(x, n, groups, 3) if with_stats else None
    moments = None
    if y is None:
        moments = launches.statistics(x, 4, n, groups)
    elif moments_parts is not None:
        moments = launches.statistics(x, n, groups, 4, moments_parts)
    kernels = launches.forward_launches(problem, config, operands, y, stats, eps, moments)
    return Prepared(problem, config, kernels, (*operands, y, stats, moments), device)


def moments(operands: Operands, groups: int, settings: Settings) -> Tensor:
    """(4, N, G): the moments of x + pre_add, under settings of split; the count as it rounds.

    x is as ``layout`` has made it native.
    """
    x = operands.x
    prepared = prepare_forward(
        x.device, tuple(map(_traits, operands)), None, False, None, groups, 0.0, "none",
        settings.batch_invariant, settings.plan_override, None,
    )  # fmt: skip
    found = launches.statistics(x, 4, x.shape[0], groups)
    prepared(*operands, None, None, found)
    return found


def backward(
    dy: Tensor,
    stats: Tensor,
    operands: Operands,
    grads: Mapping[str, Tensor],
    groups: int,
    activation: str,
    settings: Settings,
    config: Config | None = None,
) -> None:
    """Fill ``grads``, named as the operands, by ``config`` or the plan under the settings.

    The residual's gradient may be asked for only with an activation; without one it is dy. x, the
    residual and dy are as ``layout`` has made them native; so are their gradients.
    """
    prepared = prepare_backward(
        dy.device, tuple(map(_traits, operands)), _traits(dy), _dtypes(grads), None, groups,
        activation, settings.batch_invariant, settings.plan_override, config,
    )  # fmt: skip
    prepared(*operands, dy, layout.packed(stats), *grads.values(), None)


def first_half(
    dy: Tensor,
    stats: Tensor,
    operands: Operands,
    grads: Mapping[str, Tensor],
    groups: int,
    activation: str,
    settings: Settings,
) -> Tensor:
    """As ``backward`` at given statistics, under settings of split.

    Returned: parts (N, G, 2, num_partials) of sum(dx_hat) and sum(dx_hat * x_hat).
    """
    prepared = prepare_backward(
        dy.device, tuple(map(_traits, operands)), _traits(dy), _dtypes(grads), "first", groups,
        activation, settings.batch_invariant, settings.plan_override, None,
    )  # fmt: skip
    sums = launches.statistics(operands.x, dy.shape[0], groups, 2, prepared.config.num_partials)
    prepared(*operands, dy, layout.packed(stats), *grads.values(), sums)
    return sums


def second_half(
    dy: Tensor | None,
    sums: Tensor,
    stats: Tensor,
    operands: Operands,
    grads: Mapping[str, Tensor],
    groups: int,
    activation: str,
    settings: Settings,
) -> None:
    """Fill the gradients of x and pre_add from both sums (N, G, 2), under settings of split.

    Without dy: what the sums alone give. They are divided by the elements of a group of x.
    """
    prepared = prepare_backward(
        sums.device, tuple(map(_traits, operands)), _traits(dy), _dtypes(grads), "second", groups,
        activation, settings.batch_invariant, settings.plan_override, None,
    )  # fmt: skip
    prepared(*operands, dy, layout.packed(stats), *grads.values(), sums)


def _dtypes(grads: Mapping[str, Tensor]) -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((name, grad.dtype) for name, grad in grads.items())


@functools.lru_cache(maxsize=4096)
def prepare_backward(
    device: torch.device,
    traits: tuple[_Traits, ...],
    dy_traits: _Traits,
    wanted: tuple[tuple[str, torch.dtype], ...],
    half: Half,
    groups: int,
    activation: str,
    *plan_settings: Any,
) -> Prepared:
    operands, dy = Operands(*map(_template, traits)), _template(dy_traits)
    stats = launches.statistics(operands.x, operands.x.shape[0], groups, 3)
    grads = {name: torch.empty_like(getattr(operands, name), dtype=dtype) for name, dtype in wanted}
    problem = launches.problem_of("backward", operands, groups, activation)
    config = _config(problem, device, *plan_settings)
    sums = None
    if half is not None:
        num_partials = config.num_partials if half == "first" else 1
        sums = launches.statistics(operands.x, problem.n, groups, 2, num_partials)
    kernels = launches.backward_launches(problem, config, dy, operands, stats, grads, sums, half)
    templates = (*operands, dy, stats, *grads.values(), sums)
    return Prepared(problem, config, kernels, templates, device)


def _config(
    problem: Problem,
    device: torch.device,
    batch_invariant: bool,
    override: tuple[tuple[str, Any], ...],
    config: Config | None,
) -> Config:
    return config or plan(problem, gpu_of(device), batch_invariant, override)


def forget() -> None:
    """Plan the next calls anew: tables of plans have changed."""
    prepare_forward.cache_clear()
    prepare_backward.cache_clear()
