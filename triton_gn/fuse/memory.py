"""Decide whether a node of a graph may change memory that another node reads."""

from collections.abc import Iterable

from torch import fx, nn
from torch._ops import OpOverload

from triton_gn.fuse.norms import find
from triton_gn.fuse.operations import called_name, is_barrier, module_of, operation

_ALLOCATING_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.GroupNorm)
_ALLOCATING = ("add", "sub", "mul", "div", "addcmul")  # unless in place
_ALLOCATING_FUNCTIONS = ("linear", "conv1d", "conv2d", "conv3d", "cat", "matmul", "bmm")


def may_write(barrier: fx.Node, reads: Iterable[fx.Node]) -> bool:
    """Return whether a node may change what the ``reads`` refer to, or the mode they run in.

    An operation in place writes to what its first argument may share memory with, a module to what
    any of its arguments may, and neither to anything else. Any other node that :func:`is_barrier`
    names may do anything.
    """
    if not is_barrier(barrier):
        return False
    is_known = _is_in_place(barrier) or isinstance(barrier.target, OpOverload)
    if barrier.op not in ("call_module", "call_method") and not is_known:
        return True
    return not _memory(_passed_on(barrier)).isdisjoint(_memory(reads))


def _is_in_place(node: fx.Node) -> bool:
    call = operation(node)
    return call is not None and call.in_place


def _passed_on(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose memory a node may write to, or may return."""
    return node.all_input_nodes[:1] if _is_in_place(node) else node.all_input_nodes


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
            new = set(_passed_on(node)) - reached
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
    if call is not None:
        return call.name in _ALLOCATING and not call.in_place
    return called_name(node) in _ALLOCATING_FUNCTIONS or find(node) is not None
