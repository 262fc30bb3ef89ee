"""Estimate what a layer sharded over GPUs sends, beside the halo that a convolution needs anyway.

On paper: bytes are counted, times are predicted. ShardedGroupNorm sends statistics, forward in an
all_gather, backward in an all_reduce. A convolution of 3 pixels needs a slice of x, one pixel deep,
from each neighbour, and its backward one of dy. The cut is along the longest spatial dimension.
docs/sharding.md has the formulas, and where the defaults are from.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from perf import bench
from triton_gn.plan import STRATEGIES, TARGETS, estimate, plan_by_rule
from triton_gn.tools import workloads
from triton_gn.tools.workloads import DIRECTIONS, DTYPES, Workload

# layers of perf/workloads.csv, of those that one may want to shard
LAYERS = (
    "SD/SDXL VAE decoder 1024px decoder.mid_block.resnets.0.norm1",
    "SD/SDXL VAE decoder 1024px decoder.up_blocks.3.resnets.0.norm2",
    "Flux VAE decoder 2048px decoder.up_blocks.3.resnets.0.norm2",
    "HunyuanVideo VAE decoder 129f 720x1280 decoder.mid_block.resnets.0.norm1",
    "HunyuanVideo VAE decoder 129f 720x1280 decoder.up_blocks.3.resnets.0.norm2",
    "MONAI SegResNet BraTS ResBlock.norm 1x16x224x224x144",
    "nnU-Net ResEnc (InstanceNorm3d, G=C) stage C=32 2x32x128x128x128",
)
GPU = TARGETS["sm_90"]


@dataclass(frozen=True)
class Network:
    """Latencies in microseconds as NCCL estimates them, bandwidths of a GPU in GB/s each way: the
    defaults are of H100s on NVSwitch, each with 400 Gb/s of InfiniBand."""

    gpus_per_node: int = 8
    call_us: float = 6.6  # of a collective, besides its steps
    hop_us: float = 0.6  # a step over NVLink
    post_us: float = 1.0  # any step of a ring that also goes over the network, at the least
    network_hop_us: float = 2.7  # a step over the network
    tree_hop_us: float = 5.0  # the same, in a tree
    gb_per_s: float = 450.0
    network_gb_per_s: float = 50.0

    def nodes(self, gpus: int) -> int:
        return math.ceil(gpus / self.gpus_per_node)

    def all_gather_us(self, gpus: int, sent: int) -> float:
        """Of ``sent`` bytes from each, by a ring."""
        return self.call_us + self._around_us(gpus) + self._us((gpus - 1) * sent, gpus)

    def all_reduce_us(self, gpus: int, sent: int) -> float:
        """Of ``sent`` bytes, by a ring or a tree, whichever is faster."""
        nodes = self.nodes(gpus)
        across = nodes.bit_length() - 1
        up = (math.ceil(gpus / nodes) - 1) * self.hop_us + across * self.tree_hop_us
        ring = 2 * self._around_us(gpus) + self._us(2 * (gpus - 1) * sent // gpus, gpus)
        return self.call_us + min(ring, 2 * (up + self._us(sent, gpus)))

    def mesh(self, gpus: int, sent: int, direction: str) -> list[tuple["Network", int, int]]:
        """The collectives of a DeviceMesh of nodes and their GPUs: network, GPUs, bytes sent."""
        nodes, within = self.nodes(gpus), math.ceil(gpus / self.nodes(gpus))
        gathered = sent * (nodes if direction == "forward" else 1)
        both = (replace(self, gpus_per_node=1), nodes, sent), (self, within, gathered)
        return [one for one in both if one[1] > 1]

    def halo_us(self, gpus: int, sent: int) -> float:
        """Of ``sent`` bytes to each of two neighbours, at most one of which is on another node."""
        if self.nodes(gpus) == 1:
            return self.call_us + self.hop_us + self._us(2 * sent, gpus)
        within = self.hop_us + 2 * sent / (self.gb_per_s * 1e3)
        return self.call_us + max(within, self.network_hop_us + self._us(sent, gpus))

    def _around_us(self, gpus: int) -> float:
        """The steps of a ring once around."""
        nodes = self.nodes(gpus)
        hop = self.hop_us if nodes == 1 else max(self.hop_us, self.post_us)
        return (gpus - nodes) * hop + (nodes - 1) * self.network_hop_us

    def _us(self, sent: int, gpus: int) -> float:
        """For so many bytes over the slowest link."""
        slowest = self.gb_per_s if self.nodes(gpus) == 1 else self.network_gb_per_s
        return sent / (slowest * 1e3)


@dataclass(frozen=True)
class Cost:
    """Of a layer's forward or backward on each of so many GPUs."""

    gpus: int
    collectives: tuple[int, ...]  # bytes that a GPU puts into each
    halo: int  # bytes to each of two neighbours
    kernels_us: float
    collective_us: float
    halo_us: float

    @property
    def added(self) -> float:
        """Time of the collectives over that of all else."""
        return self.collective_us / (self.kernels_us + self.halo_us)


def statistics(workload: Workload, direction: str) -> tuple[int, ...]:
    """Bytes that a process puts into each collective of ShardedGroupNorm."""
    size = 8 if workload.dtype == "float64" else 4
    groups, channels = workload.n * workload.groups, workload.n * workload.channels
    if direction == "forward":
        return (4 * size * groups,)  # count, the pair of the mean, m2
    fused = [name for name in workload.fused if name in ("scale", "shift")]
    together = 2 * groups + 2 * workload.channels + len(fused) * channels
    return size * together, *[size * channels] * ("pre_add" in workload.fused)


def kernels_us(
    workload: Workload, direction: str, strategies: tuple[str, ...] = STRATEGIES
) -> float:
    """What the model expects of the layer's kernels on one GPU."""
    problem = workload.problem(direction)
    return estimate(problem, plan_by_rule(problem, GPU, strategies), GPU).us


def collectives_us(
    network: Network, gpus: int, sent: Sequence[int], direction: str, mesh: bool
) -> float:
    """Of the collectives of a layer, one after the other."""
    takes = Network.all_gather_us if direction == "forward" else Network.all_reduce_us
    calls = [(network, gpus, one) for one in sent]
    if mesh:
        calls = [call for one in sent for call in network.mesh(gpus, one, direction)]
    return sum(takes(*call) for call in calls)


def cost(
    workload: Workload, direction: str, gpus: int, network: Network, mesh: bool = False
) -> Cost:
    """Of the largest part, in one flat process group or in a mesh of nodes and GPUs."""
    longest = max(workload.spatial)
    at = workload.spatial.index(longest)
    part = (*workload.spatial[:at], math.ceil(longest / gpus), *workload.spatial[at + 1 :])
    sent = statistics(workload, direction)
    halo = math.prod(workload.shape) // longest * DTYPES[workload.dtype].itemsize
    return Cost(
        gpus,
        sent,
        halo,
        kernels_us(replace(workload, spatial=part), direction, ("split",)),
        collectives_us(network, gpus, sent, direction, mesh),
        network.halo_us(gpus, halo),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--gpus", default="8,64", metavar="A,B", help="default: 8,64")
    parser.add_argument("--match", metavar="TEXT", help="other layers of perf/workloads.csv")
    text = "the process group is a DeviceMesh of nodes and their GPUs, not flat"
    parser.add_argument("--mesh", action="store_true", help=text)
    for name, default in vars(Network()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")


def run(options: argparse.Namespace) -> int:
    """Print a table for each direction; return the exit status.

    Raises:
        ValueError: the flags name no layer, or what no network has.
    """
    network = Network(**{name: getattr(options, name) for name in vars(Network())})
    if min(vars(network).values()) <= 0:
        raise ValueError(f"sizes and times of the network must be more than 0; got {network}.")
    try:
        gpus = [int(one) for one in options.gpus.split(",")]
    except ValueError:
        gpus = []
    if not gpus or min(gpus) < 2:
        raise ValueError(f"--gpus takes numbers of at least 2, such as 8,64; got {options.gpus!r}.")
    chosen = _layers(options.match, max(gpus))
    for number, one in enumerate(chosen, 1):
        print(f"{number}: {one.name}, {one.shape_text}, {one.dtype}")
    for direction in DIRECTIONS:
        print()
        costs = [[cost(one, direction, n, network, options.mesh) for n in gpus] for one in chosen]
        report(direction, chosen, costs)
    return 0


def _layers(match: str | None, gpus: int) -> list[Workload]:
    texts = LAYERS if match is None else (match,)
    rows = list(workloads.read(bench.WORKLOADS))
    found = [one for text in texts for one in rows if bench.matches(one, text)]
    large = [one for one in found if max(one.spatial, default=0) >= gpus]
    if not large:
        raise ValueError(
            f"no layer has {match!r} in its name or shape and {gpus} pixels in a row. "
            "Remedy: another --match, or fewer --gpus."
        )
    if left := len(found) - len(large):
        print(f"Left out, with fewer pixels in a row than there are GPUs: {left}\n")
    return large


def report(direction: str, chosen: Sequence[Workload], costs: Sequence[Sequence[Cost]]) -> None:
    """Print a row for each layer and number of GPUs, the first for one GPU."""
    table = Table(
        title=f"{direction} on {GPU.name}, predicted, not measured",
        caption="statistics: of a GPU, into a collective; halo: to each of two neighbours",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("layer")
    titles = "GPUs", "statistics", "halo", "kernels\nus", "collective\nus", "halo\nus"
    for title in (*titles, "collective\nadds"):
        table.add_column(title, justify="right")
    for number, (workload, row) in enumerate(zip(chosen, costs, strict=True), 1):
        table.add_row(str(number), "1", "", "", f"{kernels_us(workload, direction):.1f}")
        for one in row:
            table.add_row(
                "",
                str(one.gpus),
                " + ".join(map(decimal, one.collectives)),
                decimal(one.halo),
                *(f"{us:.1f}" for us in (one.kernels_us, one.collective_us, one.halo_us)),
                f"{100 * one.added:.1f} %",
            )
    Console().print(table)
