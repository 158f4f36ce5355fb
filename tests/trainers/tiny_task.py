"""A real small task for the loop: a two-layer network with dropout learns a fixed function of its inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from mmpeft import randomness
from mmpeft.trainers.task import ParameterGroup


class TinyTask:
    """Samples are 8 numbers, wanted is their sine; noise on the inputs is keyed by (seed, step, position).

    Args:
        groups: buckets of the samples.
        dropout: share of hidden units left out in training.
        poison: sample that gives a loss that is not finite, if any.
    """

    loss_scale = 1.0

    def __init__(
        self,
        groups: Sequence[int] = (0,) * 7 + (1,) * 5,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        poison: int | None = None,
        learning_rates: tuple[float, float] = (1e-2, 1e-2),
        stop_after: tuple[float, float] = (1.0, 1.0),
        validation: Sequence[float] = (),
    ) -> None:
        self.groups = groups
        self.seed, self.poison, self.validation = seed, poison, list(validation)
        randomness.reseed_globals(seed, "model")
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)
        layers = {"first": self.first, "second": self.second}
        self.parameter_groups = [
            ParameterGroup(name, dict(layer.named_parameters()), rate, share)
            for (name, layer), rate, share in zip(layers.items(), learning_rates, stop_after, strict=True)
        ]
        self.inputs = randomness.normal((len(groups), 8), seed, "inputs")
        self.held_out = randomness.normal((16, 8), seed, "held out")
        self.seen: list[tuple[int, int, list[int]]] = []

    def predict(self, inputs: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(inputs))))

    def loss(
        self, samples: Sequence[tuple[int, int]], *, step: int, epoch: int, step_size: int
    ) -> tuple[Tensor, int]:
        self.seen.append((step, epoch, [index for _, index in samples]))
        rows = self.inputs[[index for _, index in samples]]
        noise = torch.stack(
            [randomness.normal((8,), self.seed, "noise", step, place) for place, _ in samples]
        )
        errors = (self.predict(rows + 0.1 * noise) - torch.sin(rows)).square().mean(1)
        if self.poison is not None:
            errors = (
                torch.where(torch.tensor([i == self.poison for _, i in samples]), torch.inf, 1.0) * errors
            )
        return errors.sum(), len(samples)

    def sample_names(self, indices: Sequence[int]) -> list[str]:
        return [f"picture-{index}.png" for index in indices]

    def validate(self) -> float | None:
        if self.validation:
            return self.validation.pop(0)
        self.dropout.eval()
        with torch.no_grad():
            error = (self.predict(self.held_out) - torch.sin(self.held_out)).square().mean()
        self.dropout.train()
        return error.item()

    def preview(self, step: int, folder: Path) -> None:
        shade = int(255 * torch.sigmoid(self.first.weight.detach().sum()).item())
        Image.new("RGB", (4, 4), (shade, shade, shade)).save(folder / "0.png")

    def save(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None:
        tensors = {
            f"{group.name}.{name}": p.detach()
            for group in self.parameter_groups
            for name, p in group.parameters.items()
        }
        safetensors.torch.save_file(tensors, folder / "weights.safetensors")
        (folder / "card.txt").write_text(f"{step} {sorted(metrics.items())!r}\n")


def values(task: TinyTask) -> Tensor:
    """All parameters of a task in one row."""
    return torch.cat([p.detach().flatten() for g in task.parameter_groups for p in g.parameters.values()])


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
