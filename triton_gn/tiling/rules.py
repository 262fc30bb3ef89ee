"""Table of PyTorch's functions and the rule for each."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_gn.functional import group_norm
from triton_gn.tiling import local, spatial

Rule = Callable[..., Any]

_NAMES: dict[Rule, str] = {
    spatial.norm: "group_norm",
    spatial.batch_norm: "batch_norm",
    spatial.trailing_norm: "layer_norm rms_norm",
    spatial.conv: "conv1d conv2d conv3d",
    spatial.attention: "scaled_dot_product_attention",
    spatial.pad: "pad",
    spatial.interpolate: "interpolate",
    spatial.pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    spatial.repeat_interleave: "repeat_interleave",
    local.linear: "linear",
    local.matmul: "matmul bmm mm __matmul__",
    local.dropout: "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    local.softmax: "softmax log_softmax",
    local.normalize: "normalize",
    local.reduce: "mean sum amax amin",
    local.split: "split chunk",
    local.unbind: "unbind",
    local.cat: "cat concat concatenate",
    local.stack: "stack",
    local.getitem: "__getitem__",
    local.rearrange: "permute transpose swapaxes swapdims movedim moveaxis t T mT "
    "unsqueeze squeeze",
    local.repeat: "repeat",
    local.reshape: "view reshape",
    local.expand: "expand broadcast_to",
    local.flatten: "flatten",
    local.unflatten: "unflatten",
    local.shape: "shape size",
    local.numel: "numel nelement",
    local.length: "__len__",
    local.like_first: "to float double half bfloat16 type type_as cpu cuda contiguous clone detach "
    "zeros_like ones_like full_like",
    local.query: "dtype device layout ndim dim requires_grad is_leaf grad_fn is_cuda is_cpu "
    "is_meta is_mps is_xpu is_sparse is_nested is_quantized is_contiguous is_floating_point "
    "is_complex element_size get_device __hash__",
    # these, and their in-place variants with a trailing underscore
    local.pointwise: "add sub subtract mul multiply div divide true_divide floor_divide rsub pow "
    "remainder fmod maximum minimum clamp clamp_min clamp_max clip where lerp addcmul addcdiv "
    "masked_fill neg negative positive abs absolute sign floor ceil round trunc reciprocal "
    "sqrt rsqrt square "
    "exp exp2 expm1 log log2 log10 log1p sin cos tan erf sigmoid tanh nan_to_num isnan isinf "
    "isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor copy "
    "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish "
    "hardsigmoid hardshrink softshrink tanhshrink threshold logsigmoid __add__ __sub__ __mul__ "
    "__truediv__ __floordiv__ __mod__ __pow__ __neg__ __pos__ __abs__ __eq__ __ne__ __lt__ __le__ "
    "__gt__ __ge__ __invert__ __and__ __or__ __xor__ __radd__ __rsub__ __rmul__ __rtruediv__ "
    "__rfloordiv__ __rmod__ __rpow__ __rdiv__ __div__ __iadd__ __isub__ __imul__ __itruediv__ "
    "__idiv__ __ifloordiv__ __ipow__",
}


def _functions(rule: Rule, name: str) -> Iterator[Any]:
    """Yield all functions that PyTorch has by this name."""
    has_in_place = rule in (local.pointwise, local.dropout) and not name.endswith("_")
    for namespace in (torch, Tensor, F, torch._C._nn):
        for alias in (name, f"{name}_") if has_in_place else (name,):
            function = getattr(namespace, alias, None)
            if callable(function):
                yield function
            elif inspect.isgetsetdescriptor(function):  # an attribute of tensors
                yield function.__get__


RULES: dict[Any, Rule] = {
    function: rule
    for rule, names in _NAMES.items()
    for name in names.split()
    for function in _functions(rule, name)
} | {group_norm: spatial.fused_norm}

# a rule's parameter name: other names that PyTorch accepts for it
_SPELLINGS = {"input": "x tensor", "other": "x2 mat2", "dim": "axis", "keepdim": "keepdims"} | {
    "training": "train",
    "factor": "upscale_factor downscale_factor",
}
ALIASES = {alias: name for name, aliases in _SPELLINGS.items() for alias in aliases.split()}

# apply even where nothing is cut: these functions may draw random numbers or change buffers
ALWAYS_ASKED = {local.dropout, spatial.attention, spatial.batch_norm}
