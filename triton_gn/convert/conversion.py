"""Replace the GroupNorm layers of existing models in place, and fold in the activations after them.

Modules change only their class, so hooks, optimizers and checkpoints stay valid.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triton_gn import activations
from triton_gn.distributed import ProcessGroup, ShardedGroupNorm
from triton_gn.module import GroupNorm
from triton_gn.report import Report

Fates = dict[nn.Module, tuple[str, str]]  # of each norm: what was done with it, and why
_UNFOLDED = "nothing that can be folded is known to follow it"
_PUBLIC_NAMES: dict[type[nn.Module], str] = {
    GroupNorm: "triton_gn.GroupNorm",
    ShardedGroupNorm: "triton_gn.distributed.ShardedGroupNorm",
}
_OURS = ("activation", "process_group")  # attributes that PyTorch's layer does not have
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", *_BACKWARD_HOOKS)


@torch.fx.wrap
def _folded(input: Tensor) -> Tensor:
    """Return the input itself. torch.fx records the call, so that the module has a node."""
    return input


class FoldedActivation(nn.Module):
    """Placeholder for an activation that the norm before it applies; returns its input."""

    activation: nn.Module

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        # not registered: the model keeps the number and the names of its modules
        self.__dict__["activation"] = activation
        self.training = activation.training

    def forward(self, input: Tensor) -> Tensor:
        """Return the input itself, of any shape."""
        return _folded(input)

    def extra_repr(self) -> str:
        """Return the activation's repr."""
        return repr(self.activation)


class Fold(NamedTuple):
    """Candidate for folding: norms of one parent and the activation that follows them.

    The names are those of the parent's children.
    """

    norms: tuple[str, ...]
    activation: str  # name of the module after the norms, "" if nothing follows
    problem: str | None = None  # why nothing can be folded


def convert(
    model: nn.Module, fold_activations: bool = True, *, process_group: ProcessGroup = None
) -> Report:
    """Turn every torch.nn.GroupNorm of a model into a :class:`triton_gn.GroupNorm`, in place.

    The module objects stay the same: parameters, hooks, modes, optimizers and the keys of the
    state_dict do not change. A layer also applies operations that follow it (folding). The module
    that did so before keeps its place and returns its input. Folded are:

    - in an nn.Sequential, an activation directly after the layer, if :func:`triton_gn.group_norm`
      has it. ``inplace`` makes no difference;
    - in any module whose forward torch.fx can trace, what follows each call of a norm, or of a
      module that returns a norm's result: scale and shift, a residual, an activation; and a sum
      with one value per sample and channel before it. Such a module gets a forward that selects
      the fused call by the shapes of each call, and runs as before wherever none fits;
    - in other modules, an activation that their source shows directly after a norm.

    With a process group, each layer, also a triton_gn.GroupNorm, becomes a
    :class:`triton_gn.distributed.ShardedGroupNorm`, for spatially sharded inputs. A layer that
    cannot be replaced uses the statistics of its shard alone; a warning names it.

    Layers with forward hooks are replaced, but nothing is folded into them. Subclasses of
    torch.nn.GroupNorm keep their class; those whose forward calls group_norm run the kernels.
    Layers to which another tool has given backward hooks, submodules or another forward stay
    unchanged: the tool may look for their class. A slice of a converted nn.Sequential, such as
    ``net[:1]``, still applies what was folded into its layers. docs/fusion.md says when a forward
    is traced and which state of a module it depends on. Convert before torch.compile: a compiled
    model would be traced again. TorchScript, ONNX, saved exports and quantisation: "When not to
    use it" in the README.

    Args:
        model: any module, which may be a GroupNorm itself.
        fold_activations: whether the layers take over the operations that follow them.
        process_group: a ProcessGroup, such as torch.distributed.group.WORLD, or a DeviceMesh; None
            for unsharded inputs.

    Returns:
        The fate of each layer, and the reason: ``print(convert(model))``.

    Raises:
        TypeError: model is not a module.
    """
    _check_is_module("convert", model)
    names = {module: name for name, module in model.named_modules()}
    unfolded = _UNFOLDED if fold_activations else "folding is switched off"
    fates: Fates = {}
    for module in filter(_is_group_norm, names):
        kind, reason = type(module), _why_left(module, process_group is not None)
        if reason is None:
            # a triton_gn.GroupNorm has its own activation, and may have been converted before
            is_torch_layer = kind is nn.GroupNorm
            if process_group is not None:
                vars(module)["process_group"] = process_group
            _set_class(module, GroupNorm if process_group is None else ShardedGroupNorm)
            vars(module).setdefault("_converted", kind)
            fates[module] = "replaced", unfolded if is_torch_layer else "was a triton_gn.GroupNorm"
        else:
            fates[module] = "left", reason
    if process_group is not None:
        unsharded = [module for module in fates if not isinstance(module, ShardedGroupNorm)]
        _warn_of_unsharded([names[module] for module in unsharded])
    if fold_activations:
        places = _places(names)
        for parent in names:
            for fold in _folds(parent):
                _try(fold, parent, places, fates)
        _fuse_blocks(model, process_group is not None, places, fates)
    report = Report()
    for module, (fate, reason) in fates.items():
        entry = names[module], reason
        getattr(report, fate).append(entry)
        if fate == "folded":
            report.replaced.append(entry)
    return report


def _fuse_blocks(
    model: nn.Module, sharded: bool, places: dict[nn.Module, list[str]], fates: Fates
) -> None:
    """Fuse the forwards of the modules that hold norms, and record it in the norms' fates."""
    from triton_gn.convert import blocks, source  # they load torch.fx

    outcome = blocks.fuse_blocks(model, sharded)
    for norm, (fate, reason) in outcome.fates.items():
        is_subclass = fate == "replaced" and hasattr(type(norm), "unfused")
        is_unknown = fates.get(norm, ("replaced", _UNFOLDED)) == ("replaced", _UNFOLDED)
        if fate == "folded" or is_subclass or is_unknown:
            fates[norm] = fate, reason
    for parent, reason in outcome.untraced.items():
        for norms, activation in source.activations(parent):
            _try(Fold(norms, activation), parent, places, fates)
        for norm in parent.children():
            if fates.get(norm) == ("replaced", _UNFOLDED):
                fates[norm] = "replaced", reason


def unconvert(model: nn.Module) -> None:
    """Undo in place all changes of :func:`convert` to a model; other triton_gn layers stay.

    Args:
        model: a converted model, or a copy of one; an untouched model stays as it is.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a converted layer was wrapped since, so that its class cannot be restored, or
            a folded activation has hooks. Nothing has changed then.
    """
    _check_is_module("unconvert", model)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        _check_is_reversible(module, name)
    for module in names:
        for key, child in module._modules.items():
            if type(child) is FoldedActivation:
                module._modules[key] = child.activation.train(child.training)
        if "_converted" in vars(module):
            original_class = vars(module).pop("_converted")
            for attribute in ("process_group",) if original_class is GroupNorm else _OURS:
                vars(module).pop(attribute, None)
            _set_class(module, original_class)
        elif hasattr(type(module), "unfused"):
            from triton_gn.convert.blocks import FORWARDS  # loaded already, with the class

            vars(module).pop(FORWARDS, None)
            _set_class(module, type(module).unfused)


def _check_is_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module; got {type(model).__name__}. "
            "Pass its modules one by one, for instance pipeline.unet."
        )


def _check_is_reversible(module: nn.Module, name: str) -> None:
    kind = type(module)
    folded = isinstance(module, FoldedActivation)
    changed = folded or "_converted" in vars(module) or hasattr(kind, "unfused")
    known = kind in (*_PUBLIC_NAMES, FoldedActivation) or "unfused" in vars(kind)
    hooked = folded and _has_hooks(module)
    if changed and (not known or hooked or _has_other_forward(module)):
        raise RuntimeError(
            "unconvert: a converted module must have its own class and forward, and a folded "
            f"activation no hooks; {name!r} of class {kind.__name__} was parametrized, wrapped or "
            "hooked after the conversion. Take that back first."
        )


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    vars(module).pop("forward", None)  # the old class's forward, restored there by a wrapper
    module.__class__ = kind


def _has_other_forward(module: nn.Module) -> bool:
    """Return whether the instance overrides its class's forward."""
    class_forward = type(module).forward.__get__(module)
    return bool(vars(module).get("forward", class_forward) != class_forward)


def _is_group_norm(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) == "GroupNorm"
    return isinstance(module, nn.GroupNorm)


def _warn_of_unsharded(names: list[str]) -> None:
    if names:
        warnings.warn(
            "convert: under a process group every GroupNorm must be sharded; left were "
            f"{', '.join(name or '(the model)' for name in names)}, which take the statistics of "
            "their shard alone. The report says why: replace them by ShardedGroupNorm by hand.",
            RuntimeWarning,
            stacklevel=3,
        )


def _why_left(module: nn.Module, sharded: bool) -> str | None:
    """Return why the GroupNorm cannot be replaced, or made sharded; None if it can."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript, which has no Triton kernels"
    if parametrize.is_parametrized(module):
        return f"is parametrized, which made its class {kind.__name__}; convert before that"
    if kind is ShardedGroupNorm or (kind is GroupNorm and not sharded):
        return f"is a {_PUBLIC_NAMES[kind]} already"
    if kind not in (nn.GroupNorm, GroupNorm):
        has_own_forward = kind.forward not in (nn.GroupNorm.forward, GroupNorm.forward)
        forward = " with a forward of its own" if has_own_forward else ""
        return f"is a {kind.__module__}.{kind.__qualname__}, a subclass{forward}"
    if _has_other_forward(module):
        return "has its forward replaced"
    for name in _OURS:
        if kind is nn.GroupNorm and hasattr(module, name):
            return f"has an attribute named {name}, which would be in the way"
    if module._modules:
        return f"holds {', '.join(module._modules)}, whose owner may go by the layer's class"
    if _has_hooks(module, _BACKWARD_HOOKS):
        return "has backward hooks, which may go by its class; add them after the conversion"
    return None


def _places(names: dict[nn.Module, str]) -> dict[nn.Module, list[str]]:
    """Return the names under which each module is registered; a shared parent counts once."""
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for parent, name in names.items():
        for key, child in parent._modules.items():
            if child is not None:
                places[child].append(f"{name}.{key}".removeprefix("."))
    return places


def _folds(parent: nn.Module) -> Iterator[Fold]:
    """Yield the candidates for folding among the children of one module."""
    kind = type(parent)
    if isinstance(parent, nn.Sequential):
        subclasses = kind.__mro__[: kind.__mro__.index(nn.Sequential)]
        problem = None
        if any({"forward", "__iter__"} & vars(subclass).keys() for subclass in subclasses):
            problem = f"its parent, a {kind.__name__}, has a forward of its own"
        keys = list(parent._modules)
        for key, following in zip_longest(keys, keys[1:], fillvalue=""):
            if isinstance(parent._modules[key], GroupNorm):
                yield Fold((key,), following, problem)


def _try(
    fold: Fold,
    parent: nn.Module,
    places: dict[nn.Module, list[str]],
    fates: Fates,
) -> None:
    """Fold the candidate if possible, and record the result in the fates of its norms."""
    activation = parent._modules.get(fold.activation)
    reason = _why_unfolded(fold, parent, activation, places)
    for key in fold.norms:
        norm = parent.get_submodule(key)
        if reason is None and activation is not None:
            name = _activation_name(activation)
            vars(norm)["activation"] = name
            fates[norm] = "folded", str(name)
        elif reason is not None and fates.get(norm) == ("replaced", _UNFOLDED):
            fates[norm] = "replaced", reason
    if reason is None and activation is not None:
        parent._modules[fold.activation] = FoldedActivation(activation)


def _why_unfolded(
    fold: Fold,
    parent: nn.Module,
    activation: nn.Module | None,
    places: dict[nn.Module, list[str]],
) -> str | None:
    """Return why the activation cannot be folded into the norms; None if it can."""
    if fold.problem is not None:
        return fold.problem
    if _has_other_forward(parent):
        return f"its parent, a {type(parent).__name__}, has its forward replaced"
    for key in fold.norms:
        norm, subject = parent.get_submodule(key), f"{key} " if len(fold.norms) > 1 else ""
        if "_converted" not in vars(norm) or "activation" in vars(norm):
            return f"{key}, before the same activation, is not a layer that convert replaced"
        if len(places[norm]) > 1:
            return f"{subject}is used in {len(places[norm])} places: {', '.join(places[norm])}"
        if _has_hooks(norm):
            return f"{subject}has hooks, which would see the activation's output"
    if activation is None:
        return "nothing follows it"
    described = f"{type(activation).__name__}({activation.extra_repr()})"
    if _activation_name(activation) is None:
        return f"is followed by {described}, which cannot be folded"
    if _has_hooks(activation) or _has_other_forward(activation):
        return f"is followed by {described}, which has hooks or its forward replaced"
    return None


def _has_hooks(module: nn.Module, kinds: tuple[str, ...] = _HOOKS) -> bool:
    return any(vars(module).get(kind) for kind in kinds)


def _activation_name(module: nn.Module) -> str | None:
    """Return the activation's name in :func:`triton_gn.group_norm`; None if it has none."""
    if module._parameters or module._buffers or module._modules:
        return None
    function = activations.function_of(module)
    return None if function is None else activations.name_of(*function)
