"""Models of diffusers: the activations that follow their norms, and their residual blocks.

This file imports diffusers. A pickled converted model refers to the classes of this file. They have
the names of their bases, because accelerate finds by name the blocks that it must not split.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models import resnet
from diffusers.utils import deprecate
from torch import Tensor, nn

from triton_gn.convert.conversion import Fold


class ResnetBlock2D(resnet.ResnetBlock2D):  # type: ignore[misc]
    """Residual block whose norms apply the activation, and the second the time embedding too.

    The forward follows diffusers' ResnetBlock2D.forward (Apache-2.0); only the norms differ.
    """

    unfused = resnet.ResnetBlock2D

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return (N, out_channels, *) of input (N, in_channels, *) and embedding (N, channels)."""
        if args or kwargs.get("scale") is not None:
            deprecate("scale", "1.0.0", "The `scale` argument is deprecated and will be ignored.")
        hidden_states = self.norm1(input_tensor)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and hidden_states.shape[0] >= 64:
                # upsampling in channels-last fails for large batches
                input_tensor, hidden_states = input_tensor.contiguous(), hidden_states.contiguous()
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)

        if self.time_emb_proj is None:
            if temb is not None and self.time_embedding_norm == "default":
                # without a projection, temb may have any shape that broadcasts
                hidden_states = hidden_states + temb
            hidden_states = self.norm2(hidden_states)
        else:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "default":
                hidden_states = self.norm2(hidden_states, pre_add=temb)
            else:
                scale, shift = torch.chunk(temb, 2, dim=1)
                hidden_states = self.norm2(hidden_states, scale=scale, shift=shift)

        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            if self.training:
                # otherwise DistributedDataParallel warns of the strides of gradients
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        output: Tensor = (input_tensor + hidden_states) / self.output_scale_factor
        return output


class TemporalResnetBlock(resnet.TemporalResnetBlock):  # type: ignore[misc]
    """Residual block whose norms apply the activation; each frame has its own time embedding.

    The forward follows diffusers' TemporalResnetBlock.forward (Apache-2.0); only the norms differ.
    """

    unfused = resnet.TemporalResnetBlock

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        """Return (N, out_channels, F, H, W) of the input and an embedding (N, F, channels)."""
        hidden_states = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))
            hidden_states = hidden_states + temb[..., None, None].permute(0, 2, 1, 3, 4)
        hidden_states = self.conv2(self.dropout(self.norm2(hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output: Tensor = input_tensor + hidden_states
        return output


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.ResnetBlock2D: ResnetBlock2D,
    resnet.TemporalResnetBlock: TemporalResnetBlock,
}
# Hashes of the forwards that the classes above replace. The three of ResnetBlock2D differ in where
# they make input_tensor contiguous.
_KNOWN_FORWARDS = {
    "14eee5641d695fd9",  # ResnetBlock2D, diffusers 0.30
    "19fb5f7d94caf766",  # ResnetBlock2D, diffusers 0.33 to 0.36
    "09614de2c837ddb5",  # ResnetBlock2D, diffusers 0.37 to 0.42
    "98f10cc009cc9e34",  # TemporalResnetBlock, diffusers 0.30 to 0.42
}


class Follows(NamedTuple):
    """The names of an activation and of the norms that it follows."""

    norms: tuple[str, ...]
    activation: str


_CONV_OUT = (Follows(("conv_norm_out",), "conv_act"),)
_BLOCK = (Follows(("norm1", "norm2"), "nonlinearity"),)
_SKIP = (Follows(("skip_norm",), "act"),)
# Classes whose forward alone calls these modules. ``follows`` reads the order of the calls in the
# source of the installed version.
_FOLLOWS: dict[str, tuple[Follows, ...]] = {
    "AllegroDecoder3D": _CONV_OUT,
    "AllegroEncoder3D": _CONV_OUT,
    "AttnSkipUpBlock2D": _SKIP,
    "Decoder": _CONV_OUT,
    "Encoder": _CONV_OUT,
    "HunyuanImageResnetBlock": _BLOCK,
    "HunyuanVideoDecoder3D": _CONV_OUT,
    "HunyuanVideoEncoder3D": _CONV_OUT,
    "HunyuanVideoResnetBlockCausal3D": _BLOCK,
    "I2VGenXLUNet": _CONV_OUT,
    "Kandinsky3UNet": (Follows(("conv_norm_out",), "conv_act_out"),),
    "MaskConditionDecoder": _CONV_OUT,
    "ResConvBlock": (
        Follows(("group_norm_1",), "gelu_1"),
        Follows(("group_norm_2",), "gelu_2"),
    ),
    "SkipUpBlock2D": _SKIP,
    "TemporalDecoder": _CONV_OUT,
    "UNet2DConditionModel": _CONV_OUT,
    "UNet2DModel": _CONV_OUT,
    "UNet3DConditionModel": _CONV_OUT,
    "UNetControlNetXSModel": (Follows(("base_conv_norm_out",), "base_conv_act"),),
    "UNetMotionModel": _CONV_OUT,
    "UNetSpatioTemporalConditionModel": _CONV_OUT,
}


def folds(parent: nn.Module) -> Iterator[Fold]:
    """Yield the candidates for folding among the children of a module of diffusers."""
    kind = type(parent)
    if kind in _FUSED:
        operands, problem = "", None
        if not _is_known(_source(kind)):
            problem = f"the {kind.__name__} of diffusers {diffusers.__version__} is not known"
        elif kind is resnet.ResnetBlock2D:
            operands, problem = _time_embedding(parent)
        yield Fold({"norm1": "", "norm2": operands}, "nonlinearity", _FUSED[kind], problem)
        return
    for norms, activation in _FOLLOWS.get(kind.__name__, ()):
        if all(isinstance(parent._modules.get(norm), nn.GroupNorm) for norm in norms):
            problem = None
            if not follows(_source(kind), norms, activation):
                problem = f"{kind.__name__}.forward may not call {activation} right after it"
            yield Fold(dict.fromkeys(norms, ""), activation, problem=problem)


def _time_embedding(block: nn.Module) -> tuple[str, str | None]:
    """Return how norm2 takes over the time embedding, "" if it does not, and the problem if any."""
    use, projected = block.time_embedding_norm, block.time_emb_proj is not None
    if projected and use in ("default", "scale_shift"):
        return f"time embedding as {'pre_add' if use == 'default' else 'scale and shift'}", None
    if projected or use == "scale_shift":
        return "", f"the use of the time embedding is not known: time_embedding_norm={use!r}"
    return "", None


def _source(kind: type[nn.Module]) -> str:
    """Return the source of the class's forward, "" if no source can be read."""
    try:
        return textwrap.dedent(inspect.getsource(kind.forward))
    except OSError:
        return ""


@functools.cache
def _is_known(forward: str) -> bool:
    lines = (line.rstrip() for line in forward.splitlines())
    code = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16] in _KNOWN_FORWARDS


@functools.cache
def follows(source: str, norms: tuple[str, ...], activation: str) -> bool:
    """Return whether a forward calls the activation after each call of a norm, and only there."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    tests = {id(n) for node in nodes if isinstance(node, ast.If) for n in ast.walk(node.test)}
    uses = Counter(
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Attribute) and id(node) not in tests
    )
    norm_names, activation_name = {f"self.{norm}" for norm in norms}, f"self.{activation}"
    calls: Counter[str] = Counter()
    for body in (getattr(node, part, None) for node in nodes for part in ("body", "orelse")):
        for before, after in pairwise(body if isinstance(body, list) else []):
            callees = list(_callees(before, after))
            if _assigns(after, activation_name) and norm_names.issuperset(callees):
                calls.update([*callees, activation_name])
    names = *norm_names, activation_name
    return uses[activation_name] > 0 and all(calls[name] == uses[name] for name in names)


def _assigns(statement: ast.stmt, function: str) -> bool:
    """Return whether the statement is ``name = function(name)``."""
    if not isinstance(statement, ast.Assign):
        return False
    name = ast.unparse(statement.targets[0])
    return ast.unparse(statement) == f"{name} = {function}({name})"


def _callees(before: ast.stmt, after: ast.stmt) -> Iterator[str]:
    """Yield the function whose result ``before`` assigns to the same name as ``after``.

    An if statement yields a function for each branch. Any other statement yields "".
    """
    if isinstance(before, ast.If) and before.orelse:
        yield from _callees(before.body[-1], after)
        yield from _callees(before.orelse[-1], after)
    elif (
        isinstance(before, ast.Assign)
        and isinstance(after, ast.Assign)
        and isinstance(before.value, ast.Call)
        and ast.unparse(before.targets[0]) == ast.unparse(after.targets[0])
    ):
        yield ast.unparse(before.value.func)
    else:
        yield ""
