"""The examples run and say what they should."""

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import triton_gn
from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[2]


def run_example(name: str, *, without: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a fresh interpreter, which fails to import the named module."""
    code = (
        "import runpy, sys\n"
        "path, without = sys.argv[1:]\n"
        "sys.modules.update({without: None} if without else {})\n"
        "runpy.run_path(path, run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "examples" / name), without],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_swap_one_layer() -> None:
    result = run_example("swap_one_layer.py")
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("output", "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    ]
    assert last.startswith("Largest difference: ")


def test_convert_diffusers() -> None:
    pytest.importorskip("diffusers")
    result = run_example("convert_diffusers.py")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "21 GroupNorm layers: 21 replaced, of which 17 folded, 0 left"
    assert sum("pre_add, silu" in line for line in lines) == 8
    assert lines[-1].startswith("Largest difference: output ")


def test_convert_diffusers_names_what_is_missing() -> None:
    result = run_example("convert_diffusers.py", without="diffusers")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("Remedy: pip install diffusers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_own_model() -> None:
    result = run_example("tune_own_model.py")
    assert result.returncode == 0, result.stderr
    *plans, last = result.stdout.strip().split("\n\n")
    assert [plan.partition(",")[0] for plan in plans] == [
        "0.body.0",
        "0.body.3",
        "1.body.0",
        "1.body.3",
    ]
    for plan in plans:
        assert re.search(r"forward: .*\n(resident|split) on .*H100.*\n.*backward: .*\n", plan)
        assert ", silu\n" in plan
    assert last == "On a GPU: python -m triton_gn tune --model examples.tune_own_model:make"


def test_factory_of_the_example_can_be_named_to_the_tuner() -> None:
    model, arguments = pkgutil.resolve_name("examples.tune_own_model:make")()
    assert sum(isinstance(layer, triton_gn.GroupNorm) for layer in model.modules()) == 4
    assert model(*arguments).shape == (2, 320, 16, 16)


# The sharded decoder


def test_sharded_decoder() -> None:
    pytest.importorskip("diffusers")
    result = run_example("sharded_decoder.py")
    assert result.returncode == 0, result.stderr
    _, local, sharded = result.stdout.splitlines()
    assert float(local.split()[-1]) > 1e-2
    assert re.fullmatch(r"  with GroupNorm sharded: .*e-0[678] \(limit 1e-05\)", sharded)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    three = Ranks(3)
    yield three
    three.stop()


def named_in_the_example(name: str) -> Any:
    return pkgutil.resolve_name(f"examples.sharded_decoder:{name}")


def step(
    model: nn.Module, x: Tensor, dy: Tensor, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """y and the gradients, those of all but GroupNorm summed over a group if there is one."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            assert parameter.grad is not None
            if group is not None and not isinstance(module, nn.GroupNorm):
                dist.all_reduce(parameter.grad, group=group)
            found[name] = parameter.grad
    return found


def compare_with_the_whole(
    group: dist.ProcessGroup, model: nn.Module, x: Tensor, dy: Tensor, cut: tuple[int, ...]
) -> Tensor:
    """This rank's y, after its gradients were found to be those of the whole."""
    model, x, dy = model.double(), x.double(), dy.double()
    taller = dy.shape[2] // x.shape[2]
    expected = step(model, x, dy)
    model.zero_grad()
    named_in_the_example("share_rows")(model, group)
    triton_gn.convert(model, process_group=group)

    def own(t: Tensor) -> Tensor:
        rows = cut if t.shape[2] == x.shape[2] else [taller * n for n in cut]
        part: Tensor = t.split(rows, 2)[group.rank()]
        last = x.stride(1) == 1
        return part.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )

    found = step(model, own(x), own(dy), group)
    expected |= {name: own(expected[name]) for name in ("x", "y")}
    torch.testing.assert_close(found, expected)
    y: Tensor = found["y"]
    return y


def train_decoder(rank: int, group: dist.ProcessGroup) -> None:
    decoder = named_in_the_example("make_vae")().requires_grad_(True).decoder
    torch.manual_seed(1)
    cut = (2, 1, 3)
    compare_with_the_whole(
        group, decoder, torch.randn(1, 4, sum(cut), 5), torch.randn(1, 3, 2 * sum(cut), 10), cut
    )


def test_sharded_decoder_trains(ranks: Ranks) -> None:
    pytest.importorskip("diffusers")
    ranks.run(train_decoder, 3)


def convolve(rank: int, group: dist.ProcessGroup, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 4, 9, 7), torch.randn(2, 8, 9, 7)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(4, 8, **options))
        own = x.contiguous(memory_format=memory_format)
        y = compare_with_the_whole(group, model, own, dy, (4, 2, 3))
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "dilation": 1},
        {"kernel_size": (5, 3), "padding": (2, 1), "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": (2, 2), "dilation": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
    ids=str,
)
def test_halos_of_convolutions(ranks: Ranks, options: dict[str, Any]) -> None:
    pytest.importorskip("diffusers")
    ranks.run(convolve, 3, options)


def refuse(rank: int, group: dist.ProcessGroup) -> None:
    share_rows = named_in_the_example("share_rows")
    for layer in (
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 2, padding=1),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.Conv3d(4, 4, 3, padding=1),
    ):
        with pytest.raises(ValueError, match="share_rows needs"):
            share_rows(nn.Sequential(layer), group)
    model = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2))
    share_rows(model, group)
    with pytest.raises(ValueError, match=r"needs 2 or more rows; process 0 has 1"):
        model(torch.ones(1, 4, 1, 5))


def test_what_cannot_share_rows_is_refused(ranks: Ranks) -> None:
    pytest.importorskip("diffusers")
    ranks.run(refuse, 1)
