"""ShardedGroupNorm on gloo processes: sharded is unsharded, and what goes over the wire."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import triton_gn
from tests.support.ranks import TIMEOUT, Ranks
from tests.support.sharding import ALL, Step, check_step
from triton_gn.distributed import ShardedGroupNorm, sharded_group_norm
from triton_gn.tools.workloads import Workload

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def expected_bytes(workload: Workload, direction: str) -> tuple[int, ...]:
    """Return the bytes that a process puts into each collective of ShardedGroupNorm."""
    size = 8 if workload.dtype == "float64" else 4
    groups, channels = workload.n * workload.groups, workload.n * workload.channels
    if direction == "forward":
        return (4 * size * groups,)  # count, the pair of the mean, m2
    fused = [name for name in workload.fused if name in ("scale", "shift")]
    together = 2 * groups + 2 * workload.channels + len(fused) * channels
    return size * together, *[size * channels] * ("pre_add" in workload.fused)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    four = Ranks(4)
    yield four
    four.stop()


@pytest.mark.parametrize(
    "step",
    [
        Step((2, 12, 6, 5), (3, 3), fused=ALL, activation="silu"),
        Step((2, 12, 6, 5), (1, 5), channels_last=True, fused=ALL, activation="gelu"),
        Step((2, 12, 6, 5), (4, 0, 2), dtype=HALF, fused=("pre_add",), activation="silu"),
        Step((2, 12, 6, 5), (0, 5, 1), dtype=BRAIN, channels_last=True, fused=ALL),
        Step((2, 12, 6, 5), (0, 0, 5), dim=3, dtype=BRAIN, param_dtype=SINGLE, fused=ALL),
        Step((3, 6, 2, 3, 7), (1, 2, 3, 1), dim=4, groups=3, activation="relu"),
        Step((3, 6, 4, 3, 2), (1, 1, 1, 1), groups=6, channels_last=True, dtype=DOUBLE, fused=ALL),
        Step((1, 6, 40), (3, 17, 20, 0), affine=(False, True), fused=("residual",)),
        Step((1, 6, 40), (1, 39), affine=(True, False), fused=("scale",), dtype=HALF),
        Step((2, 6, 40), (20, 20), affine=(False, False), activation="mish", fused=("residual",)),
        Step((2, 6, 1), (0, 1)),
    ],
    ids=str,
)
def test_sharded_is_unsharded(ranks: Ranks, step: Step) -> None:
    check_step(ranks, step)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "innermost"])
@pytest.mark.parametrize("cut", [(30, 20), (0, 49, 1), (20, 0, 13, 17)], ids=str)
def test_far_from_zero(ranks: Ranks, cut: tuple[int, ...], channels_last: bool) -> None:
    step = Step((2, 6, 50, 4), cut, channels_last=channels_last, mean=1e4, std=0.1)
    check_step(ranks, step)


def test_shards_of_other_means(ranks: Ranks) -> None:
    """The variance of halves of mean 0 and 2 is 2, not the average of theirs."""
    check_step(ranks, Step((2, 4, 64, 64), (32, 32), offsets=(0, 2)))


def some_gradients(rank: int, group: dist.ProcessGroup) -> None:
    """A gradient asked for alone equals the same gradient asked for together with others."""
    torch.manual_seed(rank)
    x, weight = torch.randn(2, 4, 5), torch.ones(4)

    def gradients(*asked: Tensor) -> tuple[Tensor, ...]:
        for t in (x, weight):
            t.requires_grad_(any(t is tensor for tensor in asked))
        y = sharded_group_norm(x, 2, weight, process_group=group)
        return torch.autograd.grad(y.pow(3).sum(), asked)

    together = gradients(x, weight)
    for asked, expected in zip((x, weight), together, strict=True):
        (grad,) = gradients(asked)
        assert grad.shape == asked.shape
        assert grad.isfinite().all()
        # other messages are added up in another order
        torch.testing.assert_close(grad, expected)


def test_gradients_of_some(ranks: Ranks) -> None:
    ranks.run(some_gradients, 3)


# What is sent


def bytes_sent(rank: int, group: dist.ProcessGroup, shape: tuple[int, ...], fused: Any) -> Any:
    """How many collectives, and bytes that this rank puts into them; forward and backward."""
    sent: list[int] = []

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def send(*tensors: Tensor, **options: Any) -> None:
            sent.append(tensors[-1].nbytes)
            real(*tensors, **options)

        return send

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist.distributed_c10d):
            if name in ("all_gather_single", "all_gather_into_tensor", "all_reduce"):
                patch.setattr(dist, name, counted(getattr(dist, name)))
            elif name.startswith(("all_", "broadcast", "reduce", "scatter", "gather", "send")):
                patch.setattr(dist, name, None, raising=False)  # nothing else sends
        n, channels = shape[:2]
        operands = {name: torch.randn(n, channels, requires_grad=True) for name in fused}
        layer = ShardedGroupNorm(4, channels, process_group=group, activation="silu")
        y = layer(torch.randn(shape, requires_grad=True), **operands)
        forward, sent = sent, []
        y.sum().backward()
    return forward, sent


@pytest.mark.parametrize("fused", [(), ("scale", "shift"), ("pre_add",)], ids=str)
def test_bytes_sent_do_not_depend_on_the_pixels(ranks: Ranks, fused: tuple[str, ...]) -> None:
    n, channels, groups = 2, 12, 4
    for spatial in ((3, 3), (40, 50), (2, 30, 30)):
        for forward, backward in ranks.run(bytes_sent, 3, (n, channels, *spatial), fused):
            assert forward == [16 * n * groups]
            per_sample = 4 * n * channels
            shared = 4 * 2 * channels + per_sample * len(set(fused) - {"pre_add"})
            after = [per_sample] if "pre_add" in fused else []
            assert backward == [8 * n * groups + shared, *after]
            layer = Workload("", n, channels, groups, spatial, "float32", fused=fused)
            assert tuple(forward) == expected_bytes(layer, "forward")
            assert tuple(backward) == expected_bytes(layer, "backward")


# The layer


def make_network(norm: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), norm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), norm(4, 8)
    ).double()


def make_batch() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(4, channels, 6, 5, generator=random, dtype=DOUBLE) for channels in (3, 8)
    )


def gradients(network: nn.Module) -> dict[str, Any]:
    return {name: p.grad for name, p in network.named_parameters()}


def gradients_of_the_whole(rows: int | None = None) -> dict[str, Any]:
    network = make_network(nn.GroupNorm)
    x, target = (t[:, :, :rows] for t in make_batch())
    (network(x) - target).square().sum().backward()
    return gradients(network)


def train_by_hand(rank: int, group: dist.ProcessGroup, how: str) -> None:
    """Gradients of norms are summed by the layers, those of all else by whoever trains."""
    if how == "convert":
        network = make_network(nn.GroupNorm)
        report = triton_gn.convert(network, process_group=group)
        assert [name for name, _ in report.replaced] == ["1", "4"]
    else:
        network = make_network(lambda *sizes: ShardedGroupNorm(*sizes, process_group=group))
    run: Any = torch.compile(network, backend="aot_eager") if how == "compile" else network
    x, target = (t.split((1, 3, 2), 2)[rank] for t in make_batch())
    (run(x) - target).square().sum().backward()
    of_norms = {
        id(p) for m in network.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()
    }
    for p in network.parameters():
        if id(p) not in of_norms:
            dist.all_reduce(p.grad, group=group)
    torch.testing.assert_close(gradients(network), gradients_of_the_whole())


@pytest.mark.parametrize("how", ["layers", "convert", "compile"])
def test_network(ranks: Ranks, how: str) -> None:
    ranks.run(train_by_hand, 3, how)


def train_in_parallel(rank: int, group: dist.ProcessGroup, how: str) -> None:
    """Two ranks share each of two halves of the batch: data parallelism beside sharding, as
    ``triton_gn.distributed`` describes it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    data, space = mesh["data"], mesh["space"]
    network = make_network(lambda *sizes: ShardedGroupNorm(*sizes, process_group=space))
    of_norms = {f"{i}.{name}" for i in (1, 4) for name in ("weight", "bias")}
    parallel: Any = DistributedDataParallel(network) if how == "DDP" else fully_shard(network)
    x, target = (
        t.chunk(2)[data.get_local_rank()].split((4, 2), 2)[space.get_local_rank()]
        for t in make_batch()
    )
    # times the number of ranks, because the gradients are averaged over them
    (4 * (parallel(x) - target).square().sum()).backward()
    for name, grad in gradients(network).items():
        if name in of_norms:
            grad /= space.size()
        grad = grad.full_tensor() if how == "FSDP2" else grad
        torch.testing.assert_close(grad, gradients_of_the_whole()[name])


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_beside_data_parallelism(ranks: Ranks, how: str) -> None:
    ranks.run(train_in_parallel, 4, how)


def mesh_of_two_dimensions(rank: int, group: dist.ProcessGroup) -> None:
    """A picture cut into 2 x 2 tiles: all dimensions of the mesh share it."""
    mesh = init_device_mesh("cpu", (2, 2))
    x = torch.randn(2, 6, 7, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def own(t: Any) -> Any:
        return t.split((3, 4), 2)[rank // 2].split((1, 4), 3)[rank % 2].clone()

    part, whole = own(x).requires_grad_(), x.clone().requires_grad_()
    ys = []
    for tensor, layer in (
        (part, ShardedGroupNorm(3, 6, dtype=DOUBLE, process_group=mesh)),
        (whole, nn.GroupNorm(3, 6, dtype=DOUBLE)),
    ):
        ys.append(layer(tensor))
        ys[-1].pow(3).sum().backward()
    torch.testing.assert_close(ys[0], own(ys[1]))
    torch.testing.assert_close(part.grad, own(whole.grad))


def test_mesh(ranks: Ranks) -> None:
    ranks.run(mesh_of_two_dimensions, 4)


def layer_by_itself(rank: int, group: dist.ProcessGroup) -> None:
    layer = ShardedGroupNorm(2, 4, activation="silu", process_group=group)
    copied = copy.deepcopy(layer)
    assert copied.process_group is group
    assert type(copied) is ShardedGroupNorm
    assert copied.weight is not layer.weight
    assert layer.state_dict().keys() == nn.GroupNorm(2, 4).state_dict().keys()
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(copied(x), triton_gn.group_norm(x, 2, activation="silu"))
    with pytest.raises(ValueError, match="more than 1 value"):
        sharded_group_norm(torch.ones(1, 4, 1), 4, process_group=group)


def test_group_of_one(ranks: Ranks) -> None:
    ranks.run(layer_by_itself, 1)


def no_samples(rank: int, group: dist.ProcessGroup) -> None:
    layer = ShardedGroupNorm(2, 4, process_group=group)
    y = layer(torch.ones(0, 4, 3 * rank, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 4, 3 * rank)
    assert not gradients(layer)["weight"].any()


def test_no_samples(ranks: Ranks) -> None:
    ranks.run(no_samples, 2)


def nothing_anywhere(rank: int, group: dist.ProcessGroup) -> None:
    layer = ShardedGroupNorm(2, 4, process_group=group)
    y = layer(torch.ones(2, 4, 0, requires_grad=True))
    y.sum().backward()
    assert not gradients(layer)["weight"].any()


def test_no_pixels_anywhere(ranks: Ranks) -> None:
    ranks.run(nothing_anywhere, 2)


def convert_and_back(rank: int, group: dist.ProcessGroup) -> None:
    class Own(nn.GroupNorm):
        pass

    network = nn.Sequential(
        nn.GroupNorm(2, 4), nn.SiLU(), triton_gn.GroupNorm(2, 4, activation="relu"), Own(2, 4)
    )
    triton_gn.convert(network)
    with pytest.warns(RuntimeWarning, match="left were 3, which"):
        report = triton_gn.convert(network, process_group=group)
    assert [name for name, _ in report.replaced] == ["0", "2"]
    assert [type(network[i]) for i in (0, 2)] == [ShardedGroupNorm] * 2
    assert isinstance(network[3], Own)
    assert [network[i].activation for i in (0, 2)] == ["silu", "relu"]
    assert all(vars(network[i])["process_group"] is group for i in (0, 2))
    with pytest.warns(RuntimeWarning, match="left were 3, which"):
        assert not triton_gn.convert(network, process_group=group).replaced
    triton_gn.unconvert(network)
    assert [type(module) for module in network] == [nn.GroupNorm, nn.SiLU, triton_gn.GroupNorm, Own]
    assert network[2].activation == "relu"
    assert not any("process_group" in vars(module) for module in network)


def test_convert_and_back(ranks: Ranks) -> None:
    ranks.run(convert_and_back, 2)


# DTensors


def of_dtensors(
    rank: int, group: dist.ProcessGroup, mesh_shape: Any, placements: Any, activation: str
) -> None:
    """y and gradients of DTensors, gathered, are those of whole tensors; with an activation, what
    ranks have in common is plain."""
    mesh = init_device_mesh("cpu", mesh_shape)
    step = Step((3, 8, 5, 6), (5,), groups=4, dtype=DOUBLE, fused=ALL, activation=activation)
    case = step.case()
    leaves: dict[str, Any] = {}

    def distributed(name: str, t: Tensor) -> Any:
        like_x = name in ("x", "residual")
        leaf: Any = t.detach()
        if like_x or activation == "none":
            where = placements if like_x else [Replicate()] * mesh.ndim
            leaf = distribute_tensor(leaf, mesh, where)
        leaves[name] = leaf.requires_grad_()
        return leaf

    y: Any
    operands = {n: distributed(n, t) for n, t in case.operands._asdict().items() if t is not None}
    x, weight, bias = (operands.pop(name) for name in ("x", "weight", "bias"))
    with CommDebugMode() as forward:
        y = triton_gn.group_norm(x, 4, weight, bias, activation=activation, **operands)
    assert y.placements == x.placements
    expected = case.expected()
    torch.testing.assert_close(y.full_tensor(), expected["y"])
    y.backward(distribute_tensor(case.dy, mesh, placements))
    for name, leaf in leaves.items():
        grad: Any = leaf.grad
        grad = grad.full_tensor() if isinstance(leaf, DTensor) else grad
        torch.testing.assert_close(grad, expected[f"d{name}"])
    if not any(isinstance(p, Shard) and p.dim > 1 for p in placements):
        assert forward.get_total_counts() == 0


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((4,), (Replicate(),)),
        ((4,), (Shard(0),)),
        ((4,), (Shard(1),)),
        ((4,), (Shard(2),)),
        ((4,), (Shard(3),)),
        ((2, 2), (Shard(0), Shard(2))),
        ((2, 2), (Shard(3), Shard(2))),
        ((2, 2), (Shard(1), Shard(3))),
        ((2, 2), (Shard(1), Shard(0))),
        ((2, 2), (Shard(1), Shard(1))),
    ],
    ids=str,
)
def test_dtensors(ranks: Ranks, mesh: Any, placements: Any, activation: str) -> None:
    ranks.run(of_dtensors, 4, mesh, placements, activation)


def cut_groups(rank: int, group: dist.ProcessGroup) -> None:
    """Shards of channels that do not keep groups whole, and sums not yet added up: gathered."""
    mesh = init_device_mesh("cpu", (4,))
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y: Any
    expected = nn.functional.group_norm(x, 3)
    with pytest.warns(RuntimeWarning, match="6 channels in 3 groups.*does not keep groups whole"):
        y = triton_gn.group_norm(distribute_tensor(x, mesh, [Shard(1)]), 3)
    torch.testing.assert_close(y.full_tensor(), expected)
    part = DTensor.from_local(x / 4, mesh, [Partial()], run_check=False)
    y = triton_gn.group_norm(part, 3)
    torch.testing.assert_close(y.full_tensor(), expected)
    with pytest.raises(TypeError, match="whose placements say"):
        sharded_group_norm(part, 3, process_group=group)
    with pytest.raises(ValueError, match="num_groups must divide"):
        triton_gn.group_norm(part, 4)


def test_dtensors_that_are_gathered(ranks: Ranks) -> None:
    ranks.run(cut_groups, 4)


def parallelized(rank: int, group: dist.ProcessGroup) -> None:
    network = make_network(triton_gn.GroupNorm)
    mesh = init_device_mesh("cpu", (4,))
    along_height = SequenceParallel(sequence_dim=2, use_local_output=True)
    parallelize_module(network, mesh, {"1": along_height, "4": along_height})
    x, target = (t[:, :, :4].chunk(4, 2)[rank] for t in make_batch())
    (network(x) - target).square().sum().backward()
    for name, grad in gradients(network).items():
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        else:
            dist.all_reduce(grad, group=group)
        torch.testing.assert_close(grad, gradients_of_the_whole(rows=4)[name])


def test_parallelize_module(ranks: Ranks) -> None:
    ranks.run(parallelized, 4)


# Errors


def twice(rank: int, group: dist.ProcessGroup) -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    y = sharded_group_norm(x, 2, process_group=group)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_double_backward_is_refused(ranks: Ranks) -> None:
    ranks.run(twice, 2)


def test_needs_torch_distributed() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="must be initialised"):
        ShardedGroupNorm(2, 4)(torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match="num_groups must divide"):
        sharded_group_norm(torch.ones(1, 4, 5), 3)


def leave_alone(rank: int, folder: Path, backward: bool, dies: bool) -> None:
    """Rank 0 dies, or does something else, before it has met the other one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=3),
    )
    layer = ShardedGroupNorm(2, 4)
    x = torch.randn(2, 4, 5, requires_grad=True)
    y = layer(x) if backward else None
    if rank == 0:
        if not dies:
            time.sleep(TIMEOUT)
        os._exit(0)
    with pytest.raises(RuntimeError):
        layer(x) if y is None else y.sum().backward()
    (folder / "said so").touch()
    os._exit(0)


@pytest.mark.parametrize(("backward", "dies"), [(False, True), (True, True), (False, False)])
def test_who_is_left_alone_gets_an_error(tmp_path: Path, backward: bool, dies: bool) -> None:
    context = spawn(leave_alone, (tmp_path, backward, dies), nprocs=2, join=False)
    try:
        context.processes[1].join(TIMEOUT / 2)
        assert (tmp_path / "said so").exists()
    finally:
        for process in context.processes:
            process.kill()
