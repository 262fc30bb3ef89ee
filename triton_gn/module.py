"""GroupNorm as a layer: it holds the parameters and calls ``functional``."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from triton_gn.checks import check_activation
from triton_gn.functional import group_norm


class GroupNorm(nn.GroupNorm):
    """A torch.nn.GroupNorm that runs the fused kernels.

    It has the same constructor, parameters and state_dict: checkpoints and code move both ways.

    Args:
        num_groups: number of groups of channels.
        num_channels: C of the input.
        eps: added to the variance.
        affine: whether there are a weight and a bias, each (C,).
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: applied to the output in the same kernel; :func:`triton_gn.group_norm` lists
            the names.
        kwargs: further arguments of the installed PyTorch's layer, such as ``bias=False``.
    """

    activation: str | None = None  # class attribute, for layers that were pickled without one
    _group_norm = staticmethod(group_norm)  # ShardedGroupNorm overrides it

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        pre_add: Tensor | None = None,
    ) -> Tensor:
        """Return y of input's shape (N, C, *), with C = num_channels.

        Operands and errors: :func:`triton_gn.group_norm`.
        """
        return self._group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            scale=scale,
            shift=shift,
            residual=residual,
            pre_add=pre_add,
        )

    def extra_repr(self) -> str:
        """Return the arguments of PyTorch's layer, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise an error for torch.jit.script, whose own error names no remedy."""
        raise RuntimeError(
            "torch.jit.script: the modules must be TorchScript, which Triton kernels are not; got "
            f"a {type(self).__name__}. Call triton_gn.unconvert on a converted model first, or use "
            "torch.jit.trace, torch.compile or torch.export."
        )
