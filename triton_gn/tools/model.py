"""Find the calls of triton_gn's kernels that a model makes, on a GPU or without one."""

import contextlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from triton_gn.ops import autograd, dispatch, launcher, settings
from triton_gn.ops.call import Call
from triton_gn.ops.launches import Launch
from triton_gn.plan import Device, Problem
from triton_gn.reference import Operands

_FORWARD = torch.ops.triton_gn.group_norm.default
_BACKWARD = torch.ops.triton_gn.group_norm_backward.default
_TENSORS = len(Operands._fields)


def made_by(factory: str) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """Return the model that a function makes, and the arguments to call it with.

    Args:
        factory: "module:function" in the Python path or the current folder. The function takes no
            arguments and returns the model and its arguments, a tuple or a dict.

    Raises:
        ValueError: there is no such function.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = pkgutil.resolve_name(factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--model must be module:factory, to be imported from {os.getcwd()}; "
            f"got {factory!r} ({error})."
        ) from error
    model, arguments = make()
    return (model, (), arguments) if isinstance(arguments, dict) else (model, arguments, {})


def _step(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run a model and, if its outputs require gradients, the backward of their sum."""
    y = model(*args, **kwargs)
    outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
    sums = [leaf.float().sum() for leaf in outputs if leaf.requires_grad]
    if sums:
        torch.stack(sums).sum().backward()


def problems_of(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Problem]:
    """Run a model on a GPU and return the problems of its GroupNorm kernels.

    Raises:
        ValueError: the model runs no kernel.
    """
    with launcher.recording() as calls:
        _step(model, args, kwargs)
    problems = list(dict.fromkeys(call.problem for call in calls))
    if not problems:
        raise ValueError(NO_KERNEL)
    return problems


NO_KERNEL = (
    "no kernel of triton_gn runs in the model. Remedy: call triton_gn.convert(model), and put the "
    "model and its arguments on the GPU."
)


@dataclass(frozen=True)
class Foreseen:
    """A call of the kernels on tensors that need not exist. It can be pickled.

    ``tensors`` holds shape, strides and dtype of each operand, and of dy in a backward.
    """

    direction: str
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]
    constants: tuple[Any, ...]

    def launches(self, gpu: Device) -> list[Launch]:
        """Return the launches of the call on a GPU that need not be present."""
        made: list[Any] = [
            None if t is None else torch.empty_strided(t[0], t[1], dtype=t[2], device="meta")
            for t in self.tensors
        ]
        if self.direction == "forward":
            groups, eps, activation, y_dtype, text, with_stats = self.constants
            call = Call(groups, eps, activation, y_dtype, settings.from_text(text))
            run: Callable[[], object] = partial(
                autograd.forward, Operands(*made), call, with_stats=with_stats
            )
        else:
            dy, stats, *operands = made
            groups, eps, activation, text, needs = self.constants
            call = Call(groups, eps, activation, dy.dtype, settings.from_text(text))
            run = partial(autograd.backward, dy, stats, Operands(*operands), call, list(needs))
        return launcher.foresee(gpu, run)


class _Collector(TorchDispatchMode):
    """Record the calls of triton_gn's operators."""

    def __init__(self, training: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Foreseen, None] = {}  # a set that keeps its order
        self._training = training

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _FORWARD:
            tensors, constants = args[:_TENSORS], args[_TENSORS:]
            self._add("forward", tensors, (*constants, self._training))
        elif func is _BACKWARD:
            tensors, constants = args[: 2 + _TENSORS], args[2 + _TENSORS :]
            self._add("backward", tensors, (*constants[:-1], tuple(constants[-1])))
        return func(*args, **(kwargs or {}))

    def _add(self, direction: str, tensors: Sequence[Any], constants: tuple[Any, ...]) -> None:
        traits = (None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        self.calls[Foreseen(direction, tuple(traits), constants)] = None


def foreseen(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Foreseen]:
    """Return the calls of the kernels in a step of a model, without running it.

    The model sees tensors without memory, on the devices of its parameters and arguments. If
    gradients are enabled, the backward counts too; its gradients are dropped.

    Raises:
        ValueError: the model runs no kernel.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = tree_map_only(Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
    collector = _Collector(torch.is_grad_enabled())
    original = dispatch.uses_kernels

    def uses_kernels(x: Tensor, backend: str) -> bool:
        """Let tensors without memory count as a GPU's; other threads have others."""
        return backend != "torch" if isinstance(x, FakeTensor) else original(x, backend)

    patched = mock.patch.object(dispatch, "uses_kernels", uses_kernels)
    with _without_memory(model, mode), patched, mode, collector:
        _step(model, *inputs)
    if not collector.calls:
        raise ValueError(NO_KERNEL)
    return list(collector.calls)


@contextlib.contextmanager
def _without_memory(model: Any, mode: FakeTensorMode) -> Iterator[None]:
    """Give a module parameters without memory for a while, so that no gradient reaches its own."""
    if not isinstance(model, nn.Module):
        yield
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fakes = {
        name: mode.from_tensor(tensor).detach().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    with _reparametrize_module(model, fakes):
        yield
