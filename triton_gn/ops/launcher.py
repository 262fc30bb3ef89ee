"""Launch cache. A repeated call costs one look-up and one call of Triton's launcher per kernel.

A call is keyed by its *signature*, everything that its launches depend on except addresses: shapes,
strides, dtypes and alignment of its tensors, its constants and its settings. The first call of a
signature is planned, described and compiled; later ones are bound to their tensors.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from triton_gn.ops import launches, layout
from triton_gn.ops.call import Call
from triton_gn.ops.device import gpu_of
from triton_gn.ops.launches import Half, Launch, Workspace
from triton_gn.plan import Config, Device, Problem, plan
from triton_gn.reference import Operands

Tensors = Sequence[Tensor | None]

_recorded: list["Prepared"] | None = None
_foreseen_gpu: Device | None = None  # of calls on tensors without memory
_foreseeing = threading.Lock()


@contextmanager
def recording() -> "Iterator[list[Prepared]]":
    """Record the calls of all threads while this context is active."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def foresee(gpu: Device, call: Callable[[], object]) -> list[Launch]:
    """Return the launches that a call would make on a GPU.

    The call must be on tensors without memory, of the device "meta". Calls of other threads run as
    ever.
    """
    global _foreseen_gpu
    with _foreseeing:
        forget()  # plans for another GPU
        _foreseen_gpu = gpu
        try:
            with recording() as recorded:
                call()
        finally:
            _foreseen_gpu = None
            forget()
    return [launch for one in recorded if one.is_foreseen for launch in one.launches]


class Prepared:
    """The launches of a signature: described on tensors without memory, then bound to real ones.

    ``templates`` are the tensors of the call in the launches' arguments. Any other tensor there
    must be a ``Workspace``, which is allocated at each call.
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
        self.is_foreseen = device.type == "meta"
        places = {id(tensor): i for i, tensor in enumerate(templates) if tensor is not None}
        self._workspaces: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        for tensor in _tensors_in([launch.arguments for launch in launches]):
            if id(tensor) not in places:
                if not isinstance(tensor, Workspace):
                    raise RuntimeError(
                        "a launch takes a tensor of its call or a Workspace; got one of shape "
                        f"{tuple(tensor.shape)} that is neither, which no call would ever fill."
                    )
                places[id(tensor)] = len(templates) + len(self._workspaces)
                self._workspaces.append((tensor.shape, tensor.stride(), tensor.dtype))
        self._kernels = [_BoundKernel(launch, places, device) for launch in launches]

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on the current stream of the tensors' device, whichever device is current."""
        if _recorded is not None:
            _recorded.append(self)
        if self.is_foreseen:
            return
        for shape, stride, dtype in self._workspaces:
            # torch.empty takes the host twice as long
            workspace = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
            # counters, the only integers, start at zero
            tensors += (workspace if dtype.is_floating_point else workspace.zero_(),)
        is_observed = _is_observed()
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            for kernel in self._kernels:
                kernel(tensors, is_observed)
        else:
            with torch.cuda.device(self._device):
                for kernel in self._kernels:
                    kernel(tensors, is_observed)


class _BoundKernel:
    """One launch whose arguments are bound to the tensors of a call."""

    def __init__(self, launch: Launch, places: Mapping[int, int], device: torch.device) -> None:
        nvidia = device.type == "cuda" and torch.version.hip is None
        arguments = launch.arguments_on(nvidia)
        self._kernel, self._grid = launch.kernel, launch.grid
        self._options = launch.options(nvidia)
        self._bind = _binding([arguments[name] for name in launch.kernel.arg_names], places)
        self._index = device.index
        # the compiled kernel and the driver's get_current_stream: one value, since another thread
        # may launch while this one makes its first call
        self._ready: tuple[Any, Callable[[int], int]] | None = None

    def __call__(self, tensors: Tensors, is_observed: bool) -> None:
        arguments, ready = self._bind(tensors), self._ready
        if ready is None or is_observed:
            compiled = self._kernel[(self._grid,)](*arguments, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                from triton.runtime import driver

                self._ready = compiled, driver.active.get_current_stream
            return
        # What Triton does with a compiled kernel, without looking it up. ``compiled`` is kept, not
        # its function alone: Triton unloads a kernel that nobody refers to.
        compiled, stream_of = ready
        compiled.run(
            self._grid, 1, 1, stream_of(self._index), compiled.function,
            compiled.packed_metadata, None, None, None, *arguments,
        )  # fmt: skip


def _binding(arguments: Sequence[Any], places: Mapping[int, int]) -> Callable[[Tensors], list[Any]]:
    """Return a function that makes a kernel's arguments out of a call's tensors.

    It is one expression, evaluated from text, so that structs of structs cost no Python call each:
    ``lambda tensors: [tensors[0], constants[0], make(constants[1], (tensors[3], constants[2]))]``.
    """
    constants: list[Any] = []

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensors[{places[id(value)]}]"
        if isinstance(value, tuple) and any(True for _ in _tensors_in(value)):
            fields = ", ".join(map(text, value))
            constants.append(type(value))  # a NamedTuple
            return f"make(constants[{len(constants) - 1}], ({fields},))"
        constants.append(value)
        return f"constants[{len(constants) - 1}]"

    source = f"lambda tensors: [{', '.join(map(text, arguments))}]"
    bind: Callable[[Tensors], list[Any]]
    bind = eval(source, {"constants": constants, "make": tuple.__new__})
    return bind


@functools.cache
def _hooks() -> Any:
    from triton import knobs

    return knobs.runtime


def _is_observed() -> bool:
    """Return True if a profiler hooks launches: Triton's own way of launching calls the hooks."""
    hooks = _hooks()
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    # chains of hooks, unless somebody has put one hook or None in their place
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _signature(tensors: Tensors) -> tuple[Any, ...]:
    """Return each tensor's shape, strides, dtype and alignment, on which launches depend."""
    signature: list[Any] = []
    for t in tensors:
        if t is None:
            signature.append(None)
        else:
            aligned = t.data_ptr() % layout.ALIGNMENT == 0
            signature.append((t.shape, t.stride(), t.dtype, aligned))
    return tuple(signature)


def _templates(signature: tuple[Any, ...]) -> Iterator[Any]:
    """Yield tensors without memory that have this signature."""
    for traits in signature:
        if traits is None:
            yield None
        else:
            shape, stride, dtype, _ = traits
            yield torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def forward(
    operands: Operands,
    call: Call,
    y: Tensor | None,
    stats: Tensor | None,
    moments: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Fill y and, unless None, stats (N, G, 3), by ``config`` or by the plan for the call.

    Operands are as ``autograd.native`` makes them; y has the strides of x. ``moments`` belong to
    plans of split only. With y, they are read and normalise x: (N, G, 4, parts). Without y, they
    are filled from x + pre_add: (4, N, G), the count as it rounds.
    """
    device, settings = operands.x.device, call.settings
    prepared = prepare_forward(
        device, _signature(operands), y is not None, stats is not None, moments is not None,
        1 if moments is None else moments.shape[-1], call.groups, call.eps, call.activation,
        call.y_dtype, settings.batch_invariant, settings.plan_override, config,
    )  # fmt: skip
    prepared((*operands, y, stats, moments))


@functools.lru_cache(maxsize=4096)
def prepare_forward(
    device: torch.device,
    signature: tuple[Any, ...],
    with_y: bool,
    with_stats: bool,
    with_moments: bool,
    parts: int,
    groups: int,
    eps: float,
    activation: str,
    y_dtype: torch.dtype,
    *plan_settings: Any,
) -> Prepared:
    operands = Operands(*_templates(signature))
    x, n = operands.x, operands.x.shape[0]
    problem = launches.problem_of("forward", operands, groups, activation)
    config = _config(problem, device, *plan_settings)
    y = layout.empty_like(x, y_dtype) if with_y else None
    stats = launches.statistics(x, n, groups, 3) if with_stats else None
    moments = None
    if with_moments:
        sizes = (n, groups, 4, parts) if with_y else (4, n, groups)
        moments = launches.statistics(x, *sizes)
    kernels = launches.forward_launches(problem, config, operands, y, stats, eps, moments)
    return Prepared(problem, config, kernels, (*operands, y, stats, moments), device)


def backward(
    operands: Operands,
    call: Call,
    dy: Tensor | None,
    stats: Tensor,
    grads: Mapping[str, Tensor],
    half: Half = None,
    sums: Tensor | None = None,
    config: Config | None = None,
) -> Tensor | None:
    """Fill ``grads``, named as the operands, by ``config`` or by the plan for the call.

    Operands and dy are as ``autograd.native`` makes them; so are the gradients of x and the
    residual. The residual's may be asked for only with an activation: without one it is dy.

    Under settings of split a backward has two halves. "reduce" returns the partials
    (N, G, 2, num_partials) of sum(dx_hat) and sum(dx_hat * x_hat), and fills gradients at
    precomputed statistics. "apply" takes their ``sums`` (N, G, 2), which it divides by the elements
    of a group of x, and fills the gradients of x and pre_add; without dy, what the sums alone give.
    """
    device, settings = operands.x.device, call.settings
    wanted = tuple(zip(grads, [grad.dtype for grad in grads.values()], strict=True))
    prepared = prepare_backward(
        device, _signature((*operands, dy)), wanted, half, call.groups, call.activation,
        settings.batch_invariant, settings.plan_override, config,
    )  # fmt: skip
    if half == "reduce":
        n, num_partials = operands.x.shape[0], prepared.config.num_partials
        sums = launches.statistics(operands.x, n, call.groups, 2, num_partials)
    prepared((*operands, dy, layout.realigned(stats), *grads.values(), sums))
    return sums


@functools.lru_cache(maxsize=4096)
def prepare_backward(
    device: torch.device,
    signature: tuple[Any, ...],
    wanted: tuple[tuple[str, torch.dtype], ...],
    half: Half,
    groups: int,
    activation: str,
    *plan_settings: Any,
) -> Prepared:
    *tensors, dy = _templates(signature)
    operands = Operands(*tensors)
    stats = launches.statistics(operands.x, operands.x.shape[0], groups, 3)
    grads = {name: torch.empty_like(getattr(operands, name), dtype=dtype) for name, dtype in wanted}
    problem = launches.problem_of("backward", operands, groups, activation)
    config = _config(problem, device, *plan_settings)
    sums = None
    if half is not None:
        num_partials = config.num_partials if half == "reduce" else 1
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
    if config is not None:
        return config
    foreseen = _foreseen_gpu if device.type == "meta" else None
    return plan(problem, foreseen or gpu_of(device), batch_invariant, override)


def forget() -> None:
    """Empty the cache, so that calls are planned anew: tables of plans have changed."""
    prepare_forward.cache_clear()
    prepare_backward.cache_clear()
