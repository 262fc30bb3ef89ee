"""Decode an image on four processes, each with some of its rows, and compare with one process.

``python examples/sharded_decoder.py`` needs no GPU and downloads nothing: the model is a small
AutoencoderKL of diffusers with random weights. Three kinds of layers need rows of other processes:

- GroupNorm for its statistics: ``triton_gn.convert(decoder, process_group=group)`` merges them;
- convolutions for the neighbouring rows: HaloConv2d;
- attention for keys and values: GatheredAttention.

All other layers, such as nearest upsampling, work on single rows. To shard your own decoder on
GPUs, copy the code above make_vae, run ``torchrun --nproc-per-node 4``, and in each process::

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    group = dist.group.WORLD
    vae = AutoencoderKL.from_pretrained(...).cuda()
    share_rows(vae.decoder, group)
    triton_gn.convert(vae.decoder, process_group=group)
    rows = vae.decode(latent.tensor_split(group.size(), dim=2)[group.rank()]).sample

Gradients flow through all of these layers. The gradients of GroupNorm's parameters are summed over
the processes already; sum those of all other parameters by dist.all_reduce yourself.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

import triton_gn

CUT = (5, 1, 7, 3)  # rows of the latent in each process; they may differ
# Relative to the largest value. The float32 error is 1e-6 here.
LIMIT = 1e-5


class Swap(Function):
    """Exchange of rows between neighbours: send ``up`` and ``down``, receive those of neighbours.

    All tensors are (N, C, rows, W). Beyond the image's top and bottom the rows are zeros. Backward
    is the same exchange: gradients return to the process that sent the rows.
    """

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, group: dist.ProcessGroup) -> Any:
        """Return the rows above and below."""
        ctx.group = group
        transfers, received = [], []
        for peer, rows in ((group.rank() - 1, up), (group.rank() + 1, down)):
            # sent as channels-last: torch.cat then keeps the memory format of the own rows
            sent = rows.movedim(1, -1).contiguous()
            buffer = torch.zeros_like(sent)
            received.append(buffer.movedim(-1, 1))
            if 0 <= peer < group.size():
                transfers.append(dist.P2POp(dist.isend, sent, group=group, group_peer=peer))
                transfers.append(dist.P2POp(dist.irecv, buffer, group=group, group_peer=peer))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        return tuple(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of up and down."""
        return *swap(*grads, ctx.group), None


swap: Any = Swap.apply


class HaloConv2d(nn.Conv2d):
    """nn.Conv2d that keeps the height, for an image whose rows are sharded among processes.

    Each process needs at least as many rows as the kernel reaches to one side. A process with fewer
    rows raises ValueError; torchrun then ends the others.
    """

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """Return the output's own rows (N, out_channels, rows, W) from own rows (N, C, rows, W)."""
        halo, width = map(int, self.padding)
        if x.shape[2] < halo:
            raise ValueError(
                f"HaloConv2d: each process needs {halo} or more rows; process {self.group.rank()} "
                f"has {x.shape[2]}. Use fewer processes or cut more evenly."
            )
        if halo:
            above, below = swap(x[:, :, :halo], x[:, :, -halo:], self.group)
            x = torch.cat([above, x, below], 2)
        sizes = self.stride, (0, width), self.dilation, self.groups
        return F.conv2d(x, self.weight, self.bias, *sizes)


class Gather(Function):
    """All-gather of unequal shards: (N, own rows, *) of each process to (N, all rows, *) in all."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup) -> Any:
        """Return the rows of all processes."""
        count = torch.tensor(shard.shape[1], device=shard.device)
        counts = [torch.empty_like(count) for _ in range(group.size())]
        dist.all_gather(counts, count, group)
        rows = [int(count) for count in counts]
        # all_gather needs shards of equal size
        padded = shard.new_zeros(shard.shape[0], max(rows), *shard.shape[2:])
        padded[:, : shard.shape[1]] = shard
        shards = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(shards, padded, group)
        ctx.group, ctx.own_rows = group, (sum(rows[: group.rank()]), shard.shape[1])
        return torch.cat([shard[:, :n] for shard, n in zip(shards, rows, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient of the own rows, summed over all processes."""
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(1, *ctx.own_rows), None


gather: Any = Gather.apply


class GatheredAttention:
    """Processor for ``attention.set_processor``: own pixels attend to pixels of all processes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, attention: Any, x: Tensor, temb: Any = None, **others: Any) -> Tensor:
        """Return the attention of x (N, C, rows, W), of the same shape, as diffusers' processor."""
        unsupported = attention.spatial_norm, attention.norm_q, attention.norm_k, *others.values()
        if any(value is not None for value in unsupported):
            raise ValueError(
                "GatheredAttention is for the self-attention of AutoencoderKL, without a mask and "
                f"without norms but a group_norm; got {attention}. Extend it for yours."
            )
        pixels = attention.group_norm(x.flatten(2)).transpose(1, 2)
        keys_values = torch.cat([attention.to_k(pixels), attention.to_v(pixels)], -1)
        qkv = attention.to_q(pixels), *gather(keys_values, self.group).chunk(2, -1)
        heads = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        for layer in attention.to_out:
            y = layer(y)
        y = y.transpose(1, 2).reshape(x.shape)
        y = y + x if attention.residual_connection else y
        y /= attention.rescale_output_factor
        return y


def share_rows(decoder: nn.Module, group: dist.ProcessGroup) -> None:
    """Make convolutions and attentions use the rows of other processes, in place."""
    from diffusers.models.attention_processor import Attention

    for layer in decoder.modules():
        if isinstance(layer, Attention):
            layer.set_processor(GatheredAttention(group))
        elif isinstance(layer, nn.modules.conv._ConvNd):
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
            keeps_height = layer.stride[0] == 1 and 2 * layer.padding[0] == reach
            if type(layer) is not nn.Conv2d or not keeps_height or layer.padding_mode != "zeros":
                raise ValueError(
                    "share_rows needs an nn.Conv2d of stride 1 with numbers of zeros as padding "
                    f"that keep the height; got {layer}. Keep it outside of what is sharded."
                )
            layer.__class__ = HaloConv2d
            vars(layer)["group"] = group


def make_vae() -> Any:
    """Return a small AutoencoderKL, the same in each process, with all parameters away from 0."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        sys.exit(
            "This example shards a model of diffusers, which is not installed. "
            "Remedy: pip install diffusers"
        )
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
    )
    for parameter in vae.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return vae


def work(rank: int, meeting: str, latent: Tensor, images: Tensor) -> None:
    """Decode this process's rows, unsharded and sharded; the first process fills ``images``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=len(CUT))
    group = dist.group.WORLD
    assert group is not None
    vae = make_vae()

    def decode() -> Tensor:
        rows = vae.decode(latent.split(CUT, 2)[rank]).sample
        image: Tensor = gather(rows.transpose(1, 2), group).transpose(1, 2)
        return image

    share_rows(vae.decoder, group)
    local = decode()  # each GroupNorm still uses the statistics of its own rows
    triton_gn.convert(vae.decoder, process_group=group)
    sharded = decode()
    if rank == 0:
        images.copy_(torch.stack([local, sharded]))
    dist.destroy_process_group()


def main() -> None:
    """Print the difference between the images of four processes and of one process."""
    # imported once, not by each process
    multiprocessing.set_forkserver_preload(["diffusers.models.autoencoders.autoencoder_kl"])
    latent = torch.randn(1, 4, sum(CUT), 16, generator=torch.Generator().manual_seed(1))
    whole = make_vae().decode(latent).sample
    images = torch.empty(2, *whole.shape).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        start_processes(work, (meeting, latent, images), len(CUT), start_method="forkserver")
    local, sharded = ((images - whole).abs().flatten(1).amax(1) / whole.abs().max()).tolist()
    print(
        f"Processes with {', '.join(map(str, CUT))} rows of the latent, largest difference from one"
    )
    print(f"  with statistics of the own rows: {local:.1e}")
    print(f"  with GroupNorm sharded:          {sharded:.1e} (limit {LIMIT:.0e})")
    if not sharded <= LIMIT:
        sys.exit("The sharded decoder computes something else.")


if __name__ == "__main__":
    main()
