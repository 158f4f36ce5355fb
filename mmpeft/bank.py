"""Adapters on a live model: loaded side by side, mixed by weights, fused into the base's weights and out again.

All low-rank adapters of a layer are packed into one pair (A_all, B_all) with a vector of adapter weights between them,
so that their cost is one branch and a new mix is new numbers in that vector.

The branch is a forward hook on the layer, not a module in its place. The module tree, and so `state_dict`, parameter
names and what other libraries look up or replace in it, stay as they are; offloading hooks of accelerate replace a
layer's `forward` and run inside; hooks pickle with the model. Every layer gets its hook when the bank is attached, so
that a model compiled afterwards has it in its graph whatever is loaded later.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mmpeft import adapter_file
from mmpeft.adapter import Adapter, LayerAdapter
from mmpeft.backbones.fingerprint import Fingerprint, compare
from mmpeft.delta import Delta, LowRank, add
from mmpeft.errors import BankError, BaseMismatch
from mmpeft.injection import live_layers, weight_shape
from mmpeft.plugins import near_miss


def attach(model: Any) -> AdapterBank:
    """Attach an empty bank to a pipeline or a module; nothing changes until adapters are loaded and mixed.

    Adapters that PEFT or diffusers have loaded stay and add up with the bank's, whatever the order, as long as they are
    plain LoRA and not fused.

    Args:
        model: a DiffusionPipeline, or one module (UNet, text encoder, ...).

    Raises:
        BankError: there is a bank already, or adapters of another library that cannot share a layer with one.
        AdapterError: there is nothing that can carry adapters.
    """
    return AdapterBank(adapter_file.modules_of(model), type(model).__name__, _prediction_of(model))


class AdapterBank:
    """The adapters of one pipeline or module; made by `attach`."""

    def __init__(self, modules: Mapping[str, nn.Module], title: str, prediction: str = "") -> None:
        self._modules = dict(modules)
        self._title, self._prediction = title, prediction
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, float] = {}
        self._kept: list[tuple[Any, Tensor]] | None = None
        self._branches: dict[str, _Branch] = {}
        self._handles: list[RemovableHandle] = []
        layers = {
            f"{component}.{disk}": module.get_submodule(live)
            for component, module in self._modules.items()
            for disk, live in live_layers(component, module).items()
        }
        if any(
            isinstance(hook, _Branch) for layer in layers.values() for hook in layer._forward_hooks.values()
        ):
            raise BankError(f"this {title} has a bank already; use it, or detach it first")
        self._refuse_foreign()
        for name, layer in layers.items():
            self._branches[name] = branch = _Branch(layer)
            self._handles.append(layer.register_forward_hook(branch))
        if any(_is_compiled(module) for root in self._modules.values() for module in root.modules()):
            torch._dynamo.reset()  # graphs made before the hooks came would go on without them

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The loaded adapters by name."""
        return dict(self._adapters)

    @property
    def weights(self) -> dict[str, float]:
        """The adapter weights of the present mix, by name."""
        return dict(self._weights)

    @property
    def is_fused(self) -> bool:
        """Whether the mix is in the base's weights."""
        return self._kept is not None

    def load(self, adapter: str | Path | Adapter, name: str, *, strict_base: bool = False) -> None:
        """Load an adapter under a name, with weight 0 until a mix names it.

        An adapter of another fine-tune of this base is loaded with a warning that states how far apart the two are.

        Args:
            adapter: an Adapter, or the path of what `load_adapter` reads.
            strict_base: refuse such an adapter.

        Raises:
            BankError: the name is taken, or the mix is fused.
            BaseMismatch: layers are missing or have other shapes here, or the base predicts something else.
            AdapterError: the file cannot be read.
        """
        self._refuse_fused("load")
        if not name or name in self._adapters:
            raise BankError(f"an adapter called {name!r} is loaded already; unload it or choose another name")
        title = name if isinstance(adapter, Adapter) else Path(adapter).name
        adapter = adapter if isinstance(adapter, Adapter) else adapter_file.load(adapter)
        adapter_file.check_fits(adapter, self._modules, title)
        self._judge_base(adapter, title, strict_base)
        deltas = {
            name: self._delta(layer, self._branches[name].layer, name) for name, layer in adapter.items()
        }
        for layer_name, delta in deltas.items():
            self._branches[layer_name].add(name, delta)
        self._adapters[name] = adapter
        self._weights[name] = 0.0

    def unload(self, name: str) -> None:
        """Take an adapter out.

        Raises:
            BankError: there is none of this name, or the mix is fused.
        """
        self._refuse_fused("unload")
        self._known(name)
        for layer in self._adapters.pop(name).layers:
            self._branches[layer].remove(name)
        del self._weights[name]

    def mix(self, mix: Mapping[str, float] | None = None, /, **weights: float) -> None:
        """Set the adapter weights; what is not named gets 0.

        Args:
            mix: adapter name -> weight, any finite number.
            weights: shorthand for the same.

        Raises:
            BankError: an unknown name, a weight that is no finite number, or the mix is fused.
        """
        self._refuse_fused("mix")
        wanted = {**(mix or {}), **weights}
        for name, weight in wanted.items():
            self._known(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise BankError(f"the weight of {name!r} must be a finite number; got {weight!r}")
        self._weights = {name: float(wanted.get(name, 0.0)) for name in self._adapters}
        for branch in self._branches.values():
            branch.mix(self._weights)

    @contextmanager
    def using(self, mix: Mapping[str, float] | None = None, /, **weights: float) -> Iterator[None]:
        """Mix within a with block; the mix before it comes back after it, live, however it ends."""
        before = self.weights
        self.mix(mix, **weights)
        try:
            yield
        finally:
            if self.is_fused:
                self.unfuse()
            self.mix({name: weight for name, weight in before.items() if name in self._adapters})

    @torch.no_grad()
    def fuse(self) -> None:
        """Put the mix into the base's weights: round(float32(W) + sum of the changes), rounded once.

        The weights that were there are kept, and come back by `unfuse`.

        Raises:
            BankError: the mix is fused already or all zero, or weights cannot be changed (quantised, offloaded).
        """
        if self.is_fused:
            raise BankError("the mix is fused already; unfuse it first")
        if not any(self._weights.values()):
            raise BankError("there is nothing to fuse: every adapter weight is 0; call mix first")
        self._refuse_foreign()
        active = {name: branch for name, branch in self._branches.items() if branch.is_active}
        for name, branch in active.items():
            if not branch.is_readable:
                raise BankError(
                    f"cannot fuse: the weight of {name} is quantised or offloaded; mix live instead"
                )
        self._kept = []
        try:
            for branch in active.values():
                weight = branch.layer.weight
                self._kept.append((branch.layer, weight.detach().clone()))
                weight.copy_(weight.float() + branch.change().to(weight.device).reshape(weight.shape))
        except BaseException:
            self._restore()
            raise
        for branch in self._branches.values():
            branch.is_silent = True

    @torch.no_grad()
    def unfuse(self) -> None:
        """Put back the weights that were there before `fuse`, byte for byte; the mix goes on live.

        Raises:
            BankError: nothing is fused, or the model changed its float type since.
        """
        if self._kept is None:
            raise BankError("nothing is fused")
        for layer, kept in self._kept:
            if layer.weight.dtype != kept.dtype:
                raise BankError(
                    f"the model went from {kept.dtype} to {layer.weight.dtype} while fused; turn it back to unfuse"
                )
        self._restore()

    def detach(self) -> None:
        """Leave the model as it was found: unfuse if fused, forget the adapters, remove the hooks."""
        if self.is_fused:
            self.unfuse()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._branches.clear()
        self._adapters.clear()
        self._weights.clear()

    def weights_digest(self) -> str:
        """Give the SHA-256 of all weights of the bank's modules, names included."""
        sha = hashlib.sha256()
        for component, module in sorted(self._modules.items()):
            for name, tensor in sorted(module.state_dict().items()):
                sha.update(f"{component}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _delta(self, layer_adapter: LayerAdapter, layer: Any, name: str) -> Delta:
        if not layer_adapter.needs_weight:
            return layer_adapter.delta()
        if not _has_readable_weight(layer):
            raise BankError(
                f"{layer_adapter.method} needs the weight of {name}, which is quantised or offloaded here"
            )
        return layer_adapter.delta(layer.weight.cpu())

    def _judge_base(self, adapter: Adapter, title: str, strict: bool) -> None:
        if adapter.card.fingerprint is None:
            return
        whole = Fingerprint.from_json(adapter.card.fingerprint)
        readable = {
            name: branch.layer.weight for name, branch in self._branches.items() if branch.is_readable
        }
        trained = Fingerprint(whole.prediction, {n: s for n, s in whole.layers.items() if n in readable})
        here = Fingerprint.of(
            {name: readable[name] for name in trained.layers}, self._prediction or whole.prediction
        )
        verdict = compare(trained, here)
        bases = f"{title} was trained on {adapter.card.base or 'another base'}"
        if verdict.kind == "other":
            raise BaseMismatch(f"{bases}, which this {self._title} is not: {verdict.reason}")
        if verdict.kind == "fine-tune":
            here_is = f"this {self._title} has the same shapes and other weights"
            sentence = f"{bases}; {here_is}, {verdict.distance:.1%} apart"
            if strict:
                raise BaseMismatch(f"{sentence}, and strict_base refuses that")
            warnings.warn(f"{sentence}; it will work the better, the closer they are", stacklevel=3)

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            hint = near_miss(name, list(self._adapters)) or "; load one first"
            raise BankError(f"no adapter called {name!r} is loaded{hint}")

    def _refuse_fused(self, wish: str) -> None:
        if self.is_fused:
            raise BankError(f"cannot {wish} while the mix is fused into the weights; unfuse it first")

    def _refuse_foreign(self) -> None:
        for root in self._modules.values():
            for name, module in root.named_modules():
                if not isinstance(getattr(module, "base_layer", None), nn.Module):
                    continue
                if getattr(module, "merged", False):
                    raise BankError(
                        f"PEFT or diffusers has fused an adapter into {name}; unfuse it there first"
                    )
                if not hasattr(module, "lora_A") or getattr(module, "lora_variant", None):
                    raise BankError(
                        f"{name} carries an adapter of PEFT or diffusers that is no plain LoRA; unload it there first"
                    )

    def _restore(self) -> None:
        # backwards: of a weight that two layers share, the first copy is the untouched one
        for layer, kept in reversed(self._kept or []):
            layer.weight.copy_(kept)
        self._kept = None
        for branch in self._branches.values():
            branch.is_silent = False


class _Branch:
    """The forward hook of one layer: adds what the adapters of the mix change in its output."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.is_silent = False
        self.is_active = False
        self._deltas: dict[str, Delta] = {}
        self._weights: dict[str, float] = {}
        # packed for the last input's device and float type
        self._A_all: Tensor | None = None  # (R, in) or (R, in, kh, kw): all ranks of all adapters
        self._B_all: Tensor | None = None  # (out, R) or (out, R, 1, 1)
        self._vector: Tensor | None = None  # (R,) or (R, 1, 1): each rank's adapter weight
        self._dense: Tensor | None = None  # the weight's shape: the mix of what is not low-rank

    @property
    def is_readable(self) -> bool:
        """Whether the base's weight lies there as plain numbers."""
        return _has_readable_weight(self.layer)

    def add(self, name: str, delta: Delta) -> None:
        if isinstance(delta, LowRank):
            # in this weight's shape: a 1x1 convolution's factors may have been saved as a linear layer's
            delta = LowRank(delta.lora_B.cpu(), delta.lora_A.cpu(), weight_shape(self.layer))
        self._deltas[name] = delta
        self._unpack()

    def remove(self, name: str) -> None:
        del self._deltas[name]
        self._unpack()

    def mix(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: weights[name] for name in self._deltas}
        self.is_active = any(self._weights.values())
        if self._vector is not None:
            with torch.inference_mode(False):
                self._vector = self._ranks_weights().to(self._vector).reshape(self._vector.shape)
        self._dense = None

    def change(self) -> Tensor:
        """Build the mix's whole change of the weight, float32."""
        return add(
            [delta.scaled(self._weights[n]) for n, delta in self._deltas.items() if self._weights[n]]
        ).dense()

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.is_silent or not self.is_active:
            return None
        x = inputs[0]
        self._pack(x)
        is_conv = isinstance(layer, nn.Conv2d)
        if self._A_all is not None and self._B_all is not None and self._vector is not None:
            # _conv_forward knows the layer's stride, padding and padding mode
            hidden = layer._conv_forward(x, self._A_all, None) if is_conv else F.linear(x, self._A_all)
            hidden = hidden * self._vector
            more = F.conv2d(hidden, self._B_all) if is_conv else F.linear(hidden, self._B_all)
            output = output + more.to(output.dtype)
        if self._dense is not None:
            more = layer._conv_forward(x, self._dense, None) if is_conv else F.linear(x, self._dense)
            output = output + more.to(output.dtype)
        return output

    def _pack(self, x: Tensor) -> None:
        """Bring the packed tensors to the input's device and float type, if they are not there."""
        needs_factors = any(isinstance(delta, LowRank) for delta in self._deltas.values())
        needs_dense = any(self._weights[n] and not isinstance(d, LowRank) for n, d in self._deltas.items())
        is_ready = not (
            (needs_factors and _is_elsewhere(self._A_all, x))
            or (needs_dense and _is_elsewhere(self._dense, x))
        )
        if is_ready:
            return
        # tensors made in inference mode could not be used where gradients flow later
        with torch.inference_mode(False), torch.no_grad():
            if needs_factors:
                self._pack_factors(x.device, x.dtype)
            if needs_dense:
                parts = [
                    d.scaled(self._weights[n]) for n, d in self._deltas.items() if not isinstance(d, LowRank)
                ]
                self._dense = add(parts).dense().to(x.device, x.dtype)

    def _pack_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        factors = [delta for delta in self._deltas.values() if isinstance(delta, LowRank)]
        A_all = torch.cat([delta.lora_A for delta in factors]).to(device, dtype)
        B_all = torch.cat([delta.lora_B for delta in factors], 1).to(device, dtype)
        vector = self._ranks_weights().to(device, dtype)
        is_conv = isinstance(self.layer, nn.Conv2d)
        self._A_all = A_all.reshape(-1, *weight_shape(self.layer)[1:])
        self._B_all = B_all[:, :, None, None] if is_conv else B_all
        self._vector = vector[:, None, None] if is_conv else vector

    def _ranks_weights(self) -> Tensor:
        ranks = {name: delta.rank for name, delta in self._deltas.items() if isinstance(delta, LowRank)}
        return torch.tensor([self._weights[name] for name, rank in ranks.items() for _ in range(rank)])

    def _unpack(self) -> None:
        self._A_all = self._B_all = self._vector = self._dense = None
        self._weights = {name: self._weights.get(name, 0.0) for name in self._deltas}
        self.is_active = any(self._weights.values())


def _is_elsewhere(packed: Tensor | None, x: Tensor) -> bool:
    return packed is None or packed.device != x.device or packed.dtype != x.dtype


def _has_readable_weight(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and not weight.is_meta
        and tuple(weight.shape) == weight_shape(layer)
    )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _prediction_of(model: Any) -> str:
    kind = getattr(getattr(getattr(model, "scheduler", None), "config", None), "prediction_type", "")
    return "v" if kind == "v_prediction" else str(kind)
