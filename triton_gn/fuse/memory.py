"""Decide whether a node of a graph may change memory that another node reads."""

from collections.abc import Iterable

from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload

from triton_gn.fuse.norms import find
from triton_gn.fuse.operations import called_name, is_barrier, module_of, operation

_ALLOCATING_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm)
_ALLOCATING = ("add", "sub", "mul", "div", "addcmul")  # unless in place
_ALLOCATING_FUNCTIONS = ("linear", "conv1d", "conv2d", "conv3d", "cat", "matmul", "bmm")


def may_write(barrier: fx.Node, reads: Iterable[fx.Node]) -> bool:
    """Return whether a node may change what the ``reads`` refer to, or the mode they run in.

    A module, and an operation in place, write to what their arguments may share memory with, and
    to nothing else. Any other node that :func:`is_barrier` names may do anything.
    """
    if not is_barrier(barrier):
        return False
    target = barrier.target
    call = operation(barrier)
    is_module = barrier.op == "call_module"
    is_method = barrier.op == "call_method"
    is_in_place = (call is not None and call.in_place) or (
        isinstance(target, OpOverload) and not isinstance(target, HigherOrderOperator)
    )
    if not (is_module or is_method or is_in_place):
        return True
    return not _memory(barrier.all_input_nodes).isdisjoint(_memory(reads))


def _memory(nodes: Iterable[fx.Node]) -> set[fx.Node | str]:
    """Return where the memory of some nodes may come from: nodes, and "inputs" for any input."""
    sources: set[fx.Node | str] = set()
    reached, waiting = set(nodes), list(nodes)
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            sources.add("inputs")  # two of them may be one tensor
            continue
        sources.add(node)
        if not _allocates(node):
            new = set(node.all_input_nodes) - reached
            reached |= new
            waiting += new
    return sources


def _allocates(node: fx.Node) -> bool:
    """Return whether a node's result is memory of its own."""
    if getattr(node.target, "allocates", False):  # a region of convert
        return True
    module, call = module_of(node), operation(node)
    if module is not None:
        return isinstance(module, _ALLOCATING_MODULES)
    if call is not None and not call.in_place:
        return call.name in _ALLOCATING
    return called_name(node) in _ALLOCATING_FUNCTIONS or find(node) is not None
