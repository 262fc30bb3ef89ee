"""Train one small network on handwritten digits with PyTorch's GroupNorm and with triton_gn's.

Both runs start from the same weights and see the same batches. Then one real batch goes through
the Triton kernels themselves: on the GPU or, without one, in Triton's interpreter.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_gn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS, BATCH = 6, 64
# Rounding alone moves the test logits by about 4e-6 in this training. An error of 1e-6 in every
# output element moves them by 2e-5, and a variance over n - 1 instead of n elements by 7e-2.
TRAINING_LIMIT = 1e-4
# Relative to the largest exact value. The float32 error is 1e-7 to 3e-7 on this batch; an eps of
# 1e-4 instead of 1e-5 causes an error of 4e-4.
KERNEL_LIMIT = 2e-6


def load_data() -> list[Tensor]:
    """Return training images, test images, training labels and test labels."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        sys.exit(
            "The demo reads its images from scikit-learn, which is not installed. "
            'Remedy: pip install "triton-gn[demo]"'
        )
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return [part.to(DEVICE) for part in split]


def make_net(group_norm: type[nn.GroupNorm]) -> nn.Sequential:
    """Return the network; its groups have 3, 10 and 4 channels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), group_norm(8, 24), nn.SiLU()),
        *(nn.Conv2d(24, 40, 3, padding=1, stride=2), group_norm(4, 40), nn.SiLU()),
        *(nn.Conv2d(40, 32, 3, padding=1), group_norm(8, 32), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    ).to(DEVICE)


def train(net: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Train and return the mean loss of each epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(EPOCHS):
        losses = []
        for batch in torch.randperm(len(images), generator=order).split(BATCH):
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curve.append(torch.stack(losses).mean().item())
    return curve


def compare_training() -> tuple[nn.Sequential, bool]:
    """Train both networks and print their results side by side.

    Return the network with triton_gn.GroupNorm, and whether the results agree.
    """
    train_images, test_images, train_labels, test_labels = load_data()
    nets = [make_net(nn.GroupNorm), make_net(triton_gn.GroupNorm)]
    curves = [train(net, train_images, train_labels) for net in nets]
    with torch.no_grad():
        logits = [net(test_images) for net in nets]
    hits = [(row.argmax(1) == test_labels).double().mean().item() for row in logits]
    loss_gap = max(abs(ours - theirs) for theirs, ours in zip(*curves, strict=True))
    logit_gap = (logits[1] - logits[0]).abs().max().item()

    note = ", where triton_gn.GroupNorm calls PyTorch's group_norm" if DEVICE == "cpu" else ""
    print(f"{len(train_images)} training and {len(test_images)} test images on {DEVICE}{note}\n")
    print(f"{'training loss':<16}{'torch.nn.GroupNorm':>20}{'triton_gn.GroupNorm':>22}")
    for epoch, (theirs, ours) in enumerate(zip(*curves, strict=True), start=1):
        print(f"{f'epoch {epoch}':<16}{theirs:>20.6f}{ours:>22.6f}")
    print(f"{'test accuracy':<16}{hits[0]:>20.2%}{hits[1]:>22.2%}\n")
    print(f"Largest difference: losses {loss_gap:.1e}, test logits {logit_gap:.1e}", end=" ")
    print(f"(limit {TRAINING_LIMIT:.0e})")
    return nets[1], max(loss_gap, logit_gap) <= TRAINING_LIMIT


def capture_batch(net: nn.Sequential) -> dict[str, Tensor]:
    """Return x, weight, bias and dy of the GroupNorm with 10 channels per group, for one batch."""
    images, _, labels, _ = load_data()
    layer = net[4]
    assert isinstance(layer, nn.GroupNorm)
    captured: dict[str, Tensor] = {}
    hook = layer.register_forward_hook(lambda _, inputs, y: captured.update(x=inputs[0], y=y))
    loss = F.cross_entropy(net(images[:BATCH]), labels[:BATCH])
    hook.remove()
    (dy,) = torch.autograd.grad(loss, captured["y"])
    batch = {"x": captured["x"], "weight": layer.weight, "bias": layer.bias, "dy": dy}
    return {name: tensor.detach() for name, tensor in batch.items()}


def run_layer(
    group_norm: Callable[..., Tensor], batch: dict[str, Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return y, dx, dweight and dbias in float64."""
    x, weight, bias, dy = (tensor.to(dtype, copy=True) for tensor in batch.values())
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = group_norm(x, 4, weight, bias)
    return [tensor.double() for tensor in (y, *torch.autograd.grad(y, leaves, dy))]


def check_kernels(batch: dict[str, Tensor]) -> bool:
    """Print the kernels' errors on the batch beside PyTorch's; return whether they are small."""
    exact = run_layer(F.group_norm, batch, torch.float64)
    theirs = run_layer(F.group_norm, batch, torch.float32)
    with triton_gn.backend("triton"):
        ours = run_layer(triton_gn.group_norm, batch, torch.float32)

    where = "on the GPU" if DEVICE == "cuda" else "in Triton's interpreter"
    print(f"\nOne batch {tuple(batch['x'].shape)} in 4 groups through the kernels {where}:")
    print(f"{'error / largest':<16}{'PyTorch':>20}{'Triton kernels':>22}")
    worst = 0.0
    for name, *results in zip(("y", "dx", "dweight", "dbias"), exact, theirs, ours, strict=True):
        scale = results[0].abs().max()
        errors = [((result - results[0]).abs().max() / scale).item() for result in results[1:]]
        print(f"{name:<16}{errors[0]:>20.1e}{errors[1]:>22.1e}")
        worst = max(worst, errors[1])
    print(f"Largest error against float64: {worst:.1e} (limit {KERNEL_LIMIT:.0e})")
    return worst <= KERNEL_LIMIT


def check_kernels_interpreted(batch: dict[str, Tensor]) -> bool:
    """Run ``check_kernels`` in a new process: Triton chooses its interpreter when imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batch.pt")
        torch.save(batch, path)
        command = [sys.executable, __file__, str(path)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run(command, env=environment, check=False).returncode == 0


def main() -> None:
    """Run both comparisons, or only that of the kernels if the argument names a saved batch."""
    # In a network this small, a second thread costs more time than it saves.
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        sys.exit(not check_kernels(torch.load(sys.argv[1])))
    # TF32 and nondeterministic convolutions would hide the differences between the GroupNorms.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    net, training_agrees = compare_training()
    batch = capture_batch(net)
    sys.stdout.flush()
    kernels_agree = (check_kernels if DEVICE == "cuda" else check_kernels_interpreted)(batch)
    sys.exit(not (training_agrees and kernels_agree))


if __name__ == "__main__":
    main()
