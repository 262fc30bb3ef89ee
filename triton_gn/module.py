"""GroupNorm as a layer: it holds the parameters, ``functional`` does the work."""

from torch import Tensor, nn

from triton_gn.functional import group_norm


class GroupNorm(nn.GroupNorm):
    """A torch.nn.GroupNorm that runs the fused kernels.

    The same constructor, parameters, state_dict and repr, so that checkpoints and code move both
    ways. Arguments, shapes and errors of the call: :func:`triton_gn.group_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return y of input's shape (N, C, *), with C = num_channels."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
