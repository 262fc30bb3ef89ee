"""Find the group normalisations of a graph, in every spelling, and write them back as one call."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from triton_gn.functional import group_norm
from triton_gn.fuse.operations import is_hooked, module_of, value
from triton_gn.module import GroupNorm

_OPERANDS = ("weight", "bias", "scale", "shift", "pre_add", "residual")
_ARGUMENTS = ("input", "num_groups", "weight", "bias", "eps")
_INSTANCE_NORM = (
    *("input", "running_mean", "running_var", "weight", "bias"),
    *("use_input_stats", "momentum", "eps"),
)
_ATEN_INSTANCE_NORM = (
    *("input", "weight", "bias", "running_mean", "running_var"),
    *("use_input_stats", "momentum", "eps", "cudnn_enabled"),
)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_OPERATOR_OPERANDS = ("input", "weight", "bias", "scale", "shift", "pre_add", "residual")


@dataclass
class Norm:
    """A group normalisation in a graph, with the operations that are fused into it.

    ``node`` is the call, ``output`` the node whose value is y. ``operands`` holds the input and all
    other tensors by name; a name of a module's parameter stands for the parameter.
    """

    node: fx.Node
    output: fx.Node
    operands: dict[str, Any]
    num_groups: Any
    eps: Any = 1e-5
    activation: str | None = None
    # y_dtype and settings of triton_gn's operator, None for every other spelling
    operator_settings: tuple[Any, Any] | None = None
    is_ours: bool = False
    keeps_dtype: bool = False  # under CUDA autocast, unlike group_norm
    module: str | None = None  # target of a call_module, whose parameters are operands
    fused: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Return whether an operand is there."""
        return self.operands.get(name) is not None


def find(node: fx.Node) -> Norm | str | None:
    """Return the group normalisation that a node computes, None if it computes none.

    A normalisation that the pass must not touch is returned as the reason.
    """
    if node.op == "call_module":
        return _of_module(node)
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target in (torch.ops.triton_gn.group_norm.default, torch.ops.triton_gn.group_norm):
        return _of_operator(node)
    if target is group_norm:
        return _of_our_function(node)
    if target in (F.group_norm, torch.group_norm, torch.ops.aten.group_norm.default):
        arguments = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        operands = {name: arguments.get(name) for name in ("input", "weight", "bias")}
        return Norm(node, node, operands, arguments["num_groups"], arguments.get("eps", 1e-5))
    if target is F.instance_norm:
        return _of_instance_norm(node, _INSTANCE_NORM)
    if target in (torch.instance_norm, torch.ops.aten.instance_norm.default):
        return _of_instance_norm(node, _ATEN_INSTANCE_NORM)
    return None


def _of_module(node: fx.Node) -> Norm | str | None:
    module = module_of(node)
    if isinstance(module, (nn.GroupNorm, *_INSTANCE_NORMS)):
        kind = type(module)
        if kind not in (nn.GroupNorm, GroupNorm, *_INSTANCE_NORMS):
            return f"is a {kind.__name__}, a subclass, whose forward is unknown"
        if is_hooked(module):
            return "its module has hooks or a forward of its own"
        if kind in _INSTANCE_NORMS and module.track_running_stats:
            return "has running statistics"
    names = [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
    operands: dict[str, Any] = {"input": node.args[0] if node.args else None}
    operands |= {name: name for name in names}
    path = str(node.target)
    if isinstance(module, nn.GroupNorm):
        operands |= dict(
            zip(("scale", "shift", "residual", "pre_add"), node.args[1:], strict=False)
        )
        operands |= dict(node.kwargs)
        activation = _activation(getattr(module, "activation", None))
        norm = Norm(node, node, operands, module.num_groups, module.eps, activation, module=path)
        norm.is_ours = isinstance(module, GroupNorm)
        return norm
    if isinstance(module, _INSTANCE_NORMS):
        return _with_channels(Norm(node, node, operands, 0, module.eps, module=path))
    return None


def _of_our_function(node: fx.Node) -> Norm:
    arguments = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    operands = {name: arguments.get(name) for name in ("input", *_OPERANDS)}
    norm = Norm(
        node, node, operands, arguments["num_groups"], arguments.get("eps", 1e-5), is_ours=True
    )
    norm.activation = _activation(arguments.get("activation"))
    return norm


def _activation(name: Any) -> str | None:
    return None if name in (None, "none") else str(name)


def _of_operator(node: fx.Node) -> Norm | str:
    users = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in users):
        return "its statistics are used"
    if len(users) != 1 or node.kwargs:
        return "its result is used in several places"
    operands = dict(zip(_OPERATOR_OPERANDS, node.args, strict=False))
    num_groups, eps, activation, y_dtype, settings = node.args[len(_OPERATOR_OPERANDS) :]
    norm = Norm(node, users[0], operands, num_groups, eps, _activation(activation))
    norm.operator_settings = y_dtype, settings
    norm.is_ours = True
    return norm


def _of_instance_norm(node: fx.Node, names: tuple[str, ...]) -> Norm | str:
    arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if arguments.get("running_mean") is not None or arguments.get("running_var") is not None:
        return "has running statistics"
    if arguments.get("use_input_stats", True) is not True:
        return "does not use the statistics of its input"
    operands = {name: arguments.get(name) for name in ("input", "weight", "bias")}
    return _with_channels(Norm(node, node, operands, 0, arguments.get("eps", 1e-5)))


def _with_channels(norm: Norm) -> Norm | str:
    x = value(norm.operands["input"])
    if x is None or x.ndim < 3 or type(x.shape[1]) is not int:
        return "an instance_norm whose number of channels is not known"
    norm.num_groups, norm.keeps_dtype = x.shape[1], True
    return norm


def emit(norm: Norm) -> fx.Node:
    """Write a call of triton_gn at the graph's insertion point; return the node of its y."""
    graph = norm.node.graph
    operands = dict.fromkeys(("input", *_OPERANDS)) | norm.operands
    for name in ("weight", "bias"):
        if isinstance(operands[name], str):
            operands[name] = graph.get_attr(f"{norm.module}.{operands[name]}")
    if norm.operator_settings is not None:
        tensors = [operands[name] for name in _OPERATOR_OPERANDS]
        constants = (norm.num_groups, norm.eps, norm.activation or "none", *norm.operator_settings)
        target: Any = norm.node.target
        both = graph.call_function(target, (*tensors, *constants))
        return graph.call_function(operator.getitem, (both, 0))
    arguments = (operands["input"], norm.num_groups, operands["weight"], operands["bias"])
    fused = {name: operands[name] for name in _OPERANDS[2:] if operands[name] is not None}
    if norm.activation is not None:
        fused["activation"] = norm.activation
    y = graph.call_function(group_norm, (*arguments, norm.eps), fused)
    x = value(norm.operands["input"])
    if norm.keeps_dtype and isinstance(x, Tensor) and x.is_cuda and x.element_size() == 2:
        y = graph.call_method("to", (y, x.dtype))  # autocast would leave float32
    return y
