"""Fuse the operations around every group norm of a graph, in place."""

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from triton_gn.fuse import decision
from triton_gn.fuse.chain import Chain
from triton_gn.fuse.norms import Norm, emit, find
from triton_gn.fuse.operations import (
    FLOATS,
    STRIDE_READERS,
    called_name,
    equal,
    is_barrier,
    is_pure,
    value,
)
from triton_gn.ops import layout, settings
from triton_gn.report import Report

log = logging.getLogger("triton_gn.fuse")


def graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    always: bool = False,
) -> Report:
    """Fuse the operations around each group norm of a graph into one call, in place.

    Each norm, with the operations around it, becomes one call of :func:`triton_gn.group_norm`.
    docs/fusion.md lists what is fused, and when nothing is.

    Args:
        graph_module: a graph before autograd: from torch.compile, ``torch.fx.symbolic_trace``, or
            the ``graph_module`` of a program that ``torch.export`` made. Graphs inside it, such as
            those of checkpointing, are changed too.
        example_inputs: inputs of the graph, for their shapes and dtypes. Graphs of torch.compile
            and torch.export know them already. Without shapes only activations are fused.
        always: fuse even where the device has no kernels, or where the kernels are predicted to be
            slower. Calls then run as :func:`triton_gn.group_norm` does anywhere.

    Returns:
        The fate of each norm, named by its node: ``print(graph(graph_module))``. Also logged, as
        "triton_gn.fuse".
    """
    if example_inputs is not None:
        mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(graph_module, mode).propagate(*example_inputs)
    return rewrite_all(graph_module, always)


def rewrite_all(root: fx.GraphModule, always: bool) -> Report:
    """Fuse in the graph of a module and in the graphs inside it; return the report."""
    report = Report()
    for name, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            rewrite(module.graph, report, always, f"{name}." if name else "")
            module.recompile()
    return report


def rewrite(code: fx.Graph, report: Report, always: bool, prefix: str = "") -> None:
    """Fuse the operations around each group norm of one graph, and report on them."""
    barriers = [node for node in code.nodes if is_barrier(node)]
    is_transformed = any("increment_nesting" in str(node.target) for node in barriers)
    for node in list(code.nodes):
        norm = find(node)
        if norm is None:
            continue
        name = prefix + node.name
        reason = norm if isinstance(norm, str) else _why_untouched(norm, always)
        if is_transformed:
            reason = "torch.func transforms calls of this graph"
        if isinstance(norm, str) or reason is not None:
            fate, reason = "left", str(reason)
        else:
            fate, reason = _fuse(norm, barriers, always)
        getattr(report, fate).append((name, reason))
        if fate == "folded":
            report.replaced.append((name, reason))
        log.info("%s %s: %s", name, fate, reason)
    code.lint()


def _fuse(norm: Norm, barriers: list[fx.Node], always: bool) -> tuple[str, str]:
    """Replace a norm and the nodes around it by one call; return its fate and the reason."""
    code = norm.node.graph
    order = {node: index for index, node in enumerate(code.nodes)}
    chain = Chain(norm, order, barriers)
    chain.follow()
    if not norm.fused and norm.is_ours:
        return "left", f"{chain.stop}; it is a call of triton_gn already"
    if not norm.fused and not always and (slower := decision.why_slower(norm)) is not None:
        return "left", f"{chain.stop}; {slower}"
    reader = _stride_reader(chain)
    if reader is not None:
        return "left", f"its memory format would change, which {reader.name} may read"
    _replace(chain)
    if not norm.fused:
        return "replaced", chain.stop
    return "folded", f"{', '.join(norm.fused)}; {chain.stop}"


def _why_untouched(norm: Norm, always: bool) -> str | None:
    """Return why a norm must stay as it is, whatever follows; None if it may be replaced."""
    if not isinstance(norm.operands["input"], fx.Node) or type(norm.eps) not in (int, float):
        return "its input is not a tensor, or its eps not a number"
    x, y = value(norm.operands["input"]), value(norm.output)
    if x is None and {"example_value", "val"} & norm.operands["input"].meta.keys():
        return "its input is a tensor subclass"
    if not always and (reason := decision.why_no_kernels(norm)) is not None:
        return reason
    if x is None or y is None:
        return None
    if free_unbacked_symbols(x):
        return "its sizes depend on data"
    if x.dtype not in FLOATS or x.layout is not torch.strided or x.is_nested or x.ndim < 2:
        return f"its input, {x.dtype} of layout {x.layout}, has no kernels"
    if not norm.is_ours and y.dtype is not _predicted_dtype(norm, x, y):
        return f"its result is {y.dtype}, which that of the kernels would not be"
    if not norm.is_ours and equal(x.numel(), norm.num_groups):
        return "each group has one value"
    return None


def _predicted_dtype(norm: Norm, x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype of the kernels' y: under CUDA autocast PyTorch's float32."""
    is_16_bit = x.dtype in (torch.float16, torch.bfloat16)
    follows = settings.current().autocast_policy == "torch" and not norm.keeps_dtype
    autocast = x.is_cuda and is_16_bit and y.dtype is torch.float32 and follows
    return torch.float32 if autocast else x.dtype


def _stride_reader(chain: Chain) -> fx.Node | None:
    """Return a node that may read y's strides, if the call gives other strides; else None.

    PyTorch's group_norm on a GPU makes channels-last input contiguous; the kernels keep it.
    """
    x, y = value(chain.norm.operands["input"]), value(chain.last)
    if x is None or y is None or all(map(equal, layout.native(x)[0].stride(), y.stride())):
        return None
    reached, waiting = set(), [chain.last]
    while waiting:
        for user in waiting.pop().users:
            if called_name(user) in STRIDE_READERS or is_barrier(user):
                return user
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return None


def _replace(chain: Chain) -> None:
    norm, last = chain.norm, chain.last
    code = norm.node.graph
    users = {node: list(node.users) for node in code.nodes}
    with code.inserting_before(last):
        for name, kind in chain.kinds.items():
            norm.operands[name] = _as_rows(norm.operands[name], kind)
        for factor in chain.factors:
            _multiply_parameters(norm, factor)
        y = emit(norm)
    y.meta = dict(last.meta)
    last.replace_all_uses_with(y)
    replaced = {norm.node, norm.output, *chain.taken}
    for node in reversed(list(code.nodes)):
        # the 1 + s of a scale may be left without users
        is_unused = is_pure(node) and any(user in replaced for user in users.get(node, []))
        if node in replaced or (is_unused and not node.users):
            replaced.add(node)
            code.erase_node(node)
    y.name = last.name  # signatures of exported programs name their outputs


def _as_rows(node: fx.Node, kind: str) -> fx.Node:
    """Return an operand as (C,) or (N, C), which the function and the operator both take."""
    values = value(node)
    assert values is not None
    if kind == "channel":
        return node if values.ndim == 1 else node.graph.call_method("reshape", (node, (-1,)))
    return node if values.ndim == 2 else node.graph.call_method("flatten", (node, 1))


def _multiply_parameters(norm: Norm, factor: fx.Node) -> None:
    """Multiply weight and bias by a factor per channel: norm(x) * (w * f) + b * f."""
    code = norm.node.graph
    flat = _as_rows(factor, "channel")
    for name in ("weight", "bias"):
        parameter = norm.operands.get(name)
        if isinstance(parameter, str):
            parameter = code.get_attr(f"{norm.module}.{parameter}")
        if parameter is not None:
            norm.operands[name] = code.call_function(operator.mul, (parameter, flat))
        elif name == "weight":
            norm.operands[name] = flat
