"""Recognise PyTorch's operations in a graph, whichever way they were spelled.

A function, a method, a module and an operator of torch.ops.aten that compute the same have the same
name here: F.silu, Tensor.silu, nn.SiLU and aten.silu are all "silu".
"""

import functools
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from triton_gn import activations

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# functions of one argument besides the input, and its default
_ARGUMENTS = {
    str(row.function): next(iter(row.arguments.items()))
    for row in activations.TABLE.values()
    if row.arguments
} | {"gelu": ("approximate", "none")}
_CASTS = ("to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "type")
_VIEWS = ("unsqueeze", "view", "reshape")
_NAMES = (
    *sorted({row.function for row in activations.TABLE.values() if row.function is not None}),
    *("add", "mul", "sub", "div", "addcmul", "dropout", *_CASTS, *_VIEWS),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# a view or a read of the memory of a tensor: its result depends on the strides
STRIDE_READERS = ("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "set_")

# functions, methods and modules whose result may be their first argument, or a view of it
_SHARING = frozenset(
    (
        *_CASTS,
        *_VIEWS,
        *("view_as", "reshape_as", "expand", "expand_as", "broadcast_to", "as_strided", "flatten"),
        *("unflatten", "squeeze", "transpose", "permute", "t", "movedim", "moveaxis", "swapaxes"),
        *("swapdims", "getitem", "__getitem__", "getattr", "select", "narrow", "chunk", "split"),
        *("tensor_split", "split_with_sizes", "hsplit", "vsplit", "unbind", "unfold", "diagonal"),
        *("real", "imag", "view_as_real", "view_as_complex", "detach", "alias", "positive"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "identity", "data"),
        *("atleast_1d", "atleast_2d", "atleast_3d", "ravel", "resolve_conj", "resolve_neg"),
        *("requires_grad", "rearrange", "conj", "adjoint", "cpu", "cuda", "pad"),
    )
)


@dataclass(frozen=True)
class Operation:
    """Canonical name and arguments of the operation that a node computes."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False  # writes into its first argument


def value(node: Any) -> Tensor | None:
    """Return the fake tensor that a tracer recorded for a node, None if there is none.

    Tensor subclasses count as unknown: they may redefine every operation.
    """
    if not isinstance(node, fx.Node):
        return None
    recorded = node.meta.get("example_value", node.meta.get("val"))
    return recorded if type(recorded) in (Tensor, nn.Parameter, FakeTensor) else None


def equal(a: Any, b: Any) -> bool:
    """Return whether two sizes are equal for certain. Asking adds no guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Return whether two shapes are equal for certain."""
    return a.ndim == b.ndim and all(map(equal, a.shape, b.shape))


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, None if it calls none."""
    root = node.graph.owning_module
    if node.op != "call_module" or root is None:
        return None
    return root.get_submodule(str(node.target))


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module's call does more than its class's forward."""
    return "forward" in vars(module) or any(getattr(module, name, None) for name in HOOKS)


@functools.cache
def _functions() -> dict[Any, str]:
    """Return the canonical name of each function that PyTorch has for a known operation."""
    named: dict[Any, str] = {
        operator.iadd: "add_",
        operator.imul: "mul_",
        operator.isub: "sub_",
        operator.itruediv: "div_",
        operator.truediv: "div",
        operator.getitem: "getitem",
    }
    for namespace in (torch, F, torch._C._nn, operator, torch.ops.aten):
        for name in _NAMES:
            for spelling in (name, f"{name}_"):
                function = getattr(namespace, spelling, None)
                if function is not None:
                    named[function] = spelling
    return named


def operation(node: fx.Node) -> Operation | None:
    """Return what a node computes, None if its operation is not a known one."""
    if node.op == "call_module":
        return _module_operation(node)
    if node.op == "call_method":
        name: str | None = str(node.target)
    elif node.op == "call_function":
        target: Any = node.target
        target = target.overloadpacket if isinstance(target, OpOverload) else target
        name = _functions().get(target)
    else:
        name = None
    if name is None or "out" in node.kwargs:
        return None
    base = name if name.endswith("__") else name.removesuffix("_")
    in_place = base != name or _asks_in_place(node)
    kwargs = {key: argument for key, argument in node.kwargs.items() if key != "inplace"}
    return Operation(base, node.args, kwargs, in_place)


def _module_operation(node: fx.Node) -> Operation | None:
    module = module_of(node)
    if module is None or is_hooked(module) or len(node.args) != 1 or node.kwargs:
        return None
    if module._modules or module._parameters or module._buffers:
        return None  # such as an observer of a tool that looks for the layer
    in_place = getattr(module, "inplace", False)
    if type(module) is nn.Identity:
        return Operation("dropout", node.args, {"p": 0.0})
    if type(module) in _DROPOUTS:
        # the mode may change after the pass, the probability does not
        return Operation("dropout", node.args, {"p": module.p}, in_place)
    function = activations.function_of(module)
    return None if function is None else Operation(function[0], node.args, function[1], in_place)


def _asks_in_place(node: fx.Node) -> bool:
    """Return whether ``inplace`` of a Python function is set, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    index = _index_of_inplace(node.target) if inspect.isfunction(node.target) else None
    return index is not None and index < len(node.args) and node.args[index] is not False


@functools.cache
def _index_of_inplace(function: Any) -> int | None:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index("inplace") if "inplace" in parameters else None


def activation_of(node: fx.Node, input: fx.Node) -> str | None:
    """Return the name of the activation that a node applies to ``input``, None if it is none."""
    call = operation(node)
    if call is None or not call.args or call.args[0] is not input:
        return None
    arguments = dict(call.kwargs)
    parameter = _ARGUMENTS.get(call.name)
    if parameter is not None:
        argument = call.args[1] if len(call.args) > 1 else parameter[1]
        arguments.setdefault(parameter[0], argument)
    # what is left by position is ``inplace``, or a parameter of an operator that has no name here
    others = call.args[1 if parameter is None else 2 :]
    if any(type(argument) is not bool for argument in others):
        return None
    return activations.name_of(call.name, arguments)


def is_identity(node: fx.Node, input: fx.Node) -> bool:
    """Return whether a node returns ``input`` as it is: a dropout of 0, a cast to its own dtype."""
    call = operation(node)
    if call is None or not call.args or call.args[0] is not input:
        return False
    if call.name == "dropout":
        rate = call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5)
        training = call.kwargs.get("training", call.args[2] if len(call.args) > 2 else True)
        training = call.kwargs.get("train", training)
        return training is False or (type(rate) in (int, float) and rate == 0)
    before, after = value(input), value(node)
    if call.name not in _CASTS or before is None or after is None or _copies(call):
        return False
    same = after.dtype is before.dtype and after.device == before.device
    strides = all(map(equal, before.stride(), after.stride()))
    return same and same_shape(before, after) and strides


def _copies(call: Operation) -> bool:
    arguments = call.args[1:] + tuple(call.kwargs.values())
    return call.kwargs.get("copy", False) is not False or True in arguments


def sum_with_one(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return s and the node of 1 + s if a node is that sum, or a view that only adds sizes of 1."""
    call = operation(node)
    while call is not None and _only_reshapes(call):
        node = call.args[0]
        call = operation(node)
    if call is None or call.name != "add" or call.in_place or call.kwargs or len(call.args) != 2:
        return None
    terms = [term for term in call.args if isinstance(term, fx.Node)]
    numbers = [term for term in call.args if type(term) in (int, float)]
    return (terms[0], node) if len(terms) == 1 and numbers == [1] else None


def _only_reshapes(call: Operation) -> bool:
    if not call.args or not isinstance(call.args[0], fx.Node):
        return False
    if call.name == "getitem":
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        return all(part is None or part is Ellipsis or part == slice(None) for part in index)
    return call.name in _VIEWS


def is_barrier(node: fx.Node) -> bool:
    """Return whether a read of memory may not move past a node.

    Such a node may write into tensors, run unknown code, or switch autocast or gradients.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if "out" in node.kwargs:
        return True
    call = operation(node)
    if call is not None and call.in_place:
        return True
    target: Any = node.target
    if node.op == "call_method":
        name = str(target)
        writes = name.startswith(("__i", "__set")) or not name.endswith("__")
        return (name.endswith("_") and writes) or name.startswith("register")
    if node.op == "call_module":
        module = module_of(node)
        is_torch = type(module).__module__.startswith("torch.nn.modules.")
        return module is None or not is_torch or is_hooked(module) or bool(_inplace(module))
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if target in _functions():
        return False
    name = getattr(target, "__name__", "_")
    home = getattr(target, "__module__", None)
    is_triton_gn = (home or "").startswith("triton_gn.")
    is_pytorch = home in (None, "_operator", "math", "builtins") or home.startswith("torch")
    in_place = name.endswith("_") or name in ("setitem", "delitem") or _asks_in_place(node)
    switches = name.startswith("_") or isinstance(target, torch._ops.HigherOrderOperator)
    in_place = in_place or (home == "_operator" and name.startswith("i") and name not in _READERS)
    return in_place or switches or not (is_pytorch or is_triton_gn)


_READERS = ("index", "inv", "invert", "is_", "is_not", "indexOf", "itemgetter")


def is_pure(node: fx.Node) -> bool:
    """Return whether a node is a known operation that can go if nothing uses its result."""
    call = operation(node)
    known = call is not None and call.name in ("add", "getitem", *_VIEWS)
    return known and node.op != "call_module" and not is_barrier(node)


def _inplace(module: nn.Module | None) -> bool:
    return any(getattr(child, "inplace", False) for child in module.modules()) if module else True


def is_written(node: fx.Node) -> bool:
    """Return whether any node writes into the tensor of this one, or into a view of it."""
    reached, waiting = {node}, [node]
    while waiting:
        source = waiting.pop()
        for user in source.users:
            if not user.args or user.args[0] is not source:
                continue
            if is_barrier(user):
                return True
            if called_name(user).lower() in _SHARING and user not in reached:
                reached.add(user)
                waiting.append(user)
    return False


def called_name(node: fx.Node) -> str:
    """Return the name of the function, method, operator or class of module that a node calls."""
    module = module_of(node)
    if module is not None:
        return type(module).__name__
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def described(node: fx.Node) -> str:
    """Return a node's name, and what it calls if the name does not tell."""
    name = called_name(node)
    return node.name if name in node.name else f"{node.name} ({name})"
