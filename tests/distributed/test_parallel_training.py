"""Data-parallel training on gloo processes: half a batch each is one process on the whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import triton_gn
from tests.support.ranks import Ranks
from tests.support.tensors import random

GROUPS = 2


def make_network(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), layer(), nn.Conv2d(4, 4, 3), layer(), nn.Flatten()
    ).double()


def fused_layer() -> nn.Module:
    return triton_gn.GroupNorm(GROUPS, 4, activation="silu")


def separate_layer() -> nn.Module:
    return Separate(GROUPS, 4)


class Separate(nn.GroupNorm):
    """A layer whose state_dict has the names of the fused layer's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


def train(network: nn.Module, batch: Tensor) -> None:
    """One step; the gradients stay."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    network(batch).pow(2).mean().backward()
    optimiser.step()


def parameters_and_gradients(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    def whole(t: Any) -> Tensor:
        full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
        return full.detach().clone()

    return {
        name.removeprefix("module."): (whole(parameter), whole(parameter.grad))
        for name, parameter in network.named_parameters()
    }


def make_batch() -> Tensor:
    return random(4, 3, 6, 6, seed=11)


def parallel_ddp(network: nn.Module) -> nn.Module:
    return DistributedDataParallel(network)


def parallel_fsdp(network: nn.Module) -> nn.Module:
    for layer in network.children():
        if list(layer.parameters()):
            fully_shard(layer)
    sharded: nn.Module = fully_shard(network)  # type: ignore[assignment]
    return sharded


PARALLEL = {"DDP": parallel_ddp, "FSDP": parallel_fsdp}


def shifted(network: nn.Module) -> nn.Module:
    """Fill the parameters as if they were trained."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    return network


def train_on_half(rank: int, _: Any, name: str) -> tuple[Any, Any]:
    """Train on one process's half of the batch, from and to a state_dict of PyTorch's layers."""
    whole = StateDictOptions(full_state_dict=True)
    network = PARALLEL[name](make_network(fused_layer))
    trained = shifted(make_network(separate_layer)).state_dict()
    set_model_state_dict(network, dict(trained), options=whole)
    train(network, make_batch().chunk(2)[rank])
    return parameters_and_gradients(network), get_model_state_dict(network, options=whole)


def test_parallel_training_is_that_of_one_process() -> None:
    alone = shifted(make_network(separate_layer))
    train(alone, make_batch())
    ranks = Ranks(2)
    try:
        answers = [answer for name in PARALLEL for answer in ranks.run(train_on_half, 2, name)]
    finally:
        ranks.stop()
    for results, state_dict in answers:
        torch.testing.assert_close(results, parameters_and_gradients(alone))
        loaded = make_network(separate_layer)
        loaded.load_state_dict(state_dict)
        torch.testing.assert_close(loaded(make_batch()), alone(make_batch()))
