"""The optimisers, from the libraries that have them, and their state as tensors and JSON."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mmpeft.config import TrainSettings
from mmpeft.errors import ConfigError, MissingDependency, TrainingError
from mmpeft.trainers.task import ParameterGroup


def build(settings: TrainSettings, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Make the optimiser that a recipe names, with one of its parameter groups for each of ours, in order.

    AdamW: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101. 8-bit AdamW:
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861. Prodigy: Mishchenko and
    Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101. Adafactor: Shazeer
    and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235.

    Raises:
        MissingDependency: the library that has it is not installed.
        ConfigError: Prodigy with more than one learning rate: it finds one for all.
    """
    parameters = [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups]
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, **common, betas=settings.betas, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **common)
        case "adamw8bit":
            return _adamw8bit(parameters, **common, betas=settings.betas)
        case "prodigy":
            rates = sorted({group.learning_rate for group in groups})
            if len(rates) > 1:
                raise ConfigError(
                    f"train.optimizer: prodigy finds one learning rate for all components; got {rates}; "
                    "leave components.*.learning_rate unset, or take adamw"
                )
            return _prodigy(parameters, **common, betas=settings.betas)


def _adamw8bit(parameters: list[dict[str, Any]], **settings: Any) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingDependency(
            "bitsandbytes", "train.optimizer = adamw8bit", "pip install 'mmpeft[adamw8bit]'"
        ) from error
    optimizer: Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def _prodigy(parameters: list[dict[str, Any]], **settings: Any) -> Optimizer:
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise MissingDependency(
            "prodigyopt", "train.optimizer = prodigy", "pip install 'mmpeft[prodigy]'"
        ) from error
    # Its constructor prints; the two switches are what its authors advise for diffusion models.
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: Optimizer = Prodigy(
            parameters, **settings, use_bias_correction=True, safeguard_warmup=True
        )
    return optimizer


def state_of(optimizer: Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimiser's state apart into what safetensors and what JSON can hold.

    Args:
        names: of its parameters, over all groups in order.

    Returns:
        Copies of its tensors on the CPU, by "<place in the state>:<parameter>", and {"scalars": numbers under the same
        names, "groups": of each group what is no setting (Prodigy's estimate of the rate)}.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entry in state["state"].items():
        for place, value in _leaves(entry):
            key = f"{place}:{names[index]}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            else:
                scalars[key] = value
    groups = [
        {key: value for key, value in group.items() if key != "params" and _is_learned(optimizer, key, value)}
        for group in state["param_groups"]
    ]
    return tensors, {"scalars": scalars, "groups": groups}


def restore(
    optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put a state from `state_of` back into a fresh optimiser of the same kind over the same parameters.

    Raises:
        TrainingError: it belongs to other parameters.
    """
    indices = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        place, name = key.split(":", 1)
        if name not in indices:
            raise TrainingError(
                f"the checkpoint has an optimiser state for {name!r}, which this run does not train"
            )
        *parents, leaf = place.split("/")
        entry = entries.setdefault(indices[name], {})
        for parent in parents:
            entry = entry.setdefault(parent, {})
        entry[leaf] = value
    state = optimizer.state_dict()
    state["state"] = entries
    for group, saved in zip(state["param_groups"], rest["groups"], strict=True):
        group.update(saved)
    optimizer.load_state_dict(state)


def _leaves(entry: Mapping[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):  # bitsandbytes keeps its quantised state one level down
            yield from _leaves(value, f"{parents}{key}/")
        else:
            yield f"{parents}{key}", value


def _is_learned(optimizer: Optimizer, key: str, value: Any) -> bool:
    # The learning rate is set anew at every step, what equals its default is a setting, and state is a number.
    return key != "lr" and isinstance(value, int | float) and value != optimizer.defaults.get(key, object())
