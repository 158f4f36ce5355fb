"""Adapters on a live model: loaded side by side, mixed by weights, fused into the base's weights and out again.

All low-rank adapters of a layer are packed into one pair (A_all, B_all) with a vector of adapter weights between them,
so that their cost is one branch and a new mix is new numbers in that vector. What one layer computes, what
becomes of the weights, and what varies in time and place is in live/.

The branch is a forward hook on the layer, not a module in its place and not another `forward`. The module tree, and so
`state_dict`, parameter names and what other libraries look up or replace in it, stay as they are; offloading hooks of
accelerate and diffusers, and LyCORIS, replace a layer's `forward` and put the one back that they found, which would
lose one of ours without a word; hooks pickle and copy with the model. Every layer gets its hook when the bank is
attached, so that a model compiled afterwards has it in its graph whatever is loaded later.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmpeft import routing
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.backbones.fingerprint import Fingerprint, compare
from mmpeft.base_modules import check_fits, modules_of
from mmpeft.batch_layout import BatchLayout
from mmpeft.delta import Delta
from mmpeft.disk.safetensors_file import stored_bytes
from mmpeft.errors import AdapterError, BankError, ConfigError, MethodError
from mmpeft.injection import is_adaptable, live_parameters
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.live import fusing
from mmpeft.live.branch import Branch, Part
from mmpeft.live.conditions import Conditions
from mmpeft.live.fusing import Fusion, FusionReport
from mmpeft.live.layer_branch import LayerBranch
from mmpeft.live.norm_branch import NormBranch, is_norm
from mmpeft.mix import Mix, Weight
from mmpeft.plugins import near_miss


def attach(model: Any, *, capacity: int | None = None) -> AdapterBank:
    """Attach an empty bank to a pipeline or a module; nothing changes until adapters are loaded and mixed.

    Adapters that PEFT or diffusers have loaded stay and add up with the bank's, whatever the order, as long as they are
    plain LoRA and not fused. A copied or unpickled model computes its mix as it was; attaching to it starts anew.

    Args:
        model: a DiffusionPipeline, or one module (UNet, text encoder, ...).
        capacity: ranks to reserve at every layer for low-rank adapters. For models that torch.compile compiles: while
            the ranks suffice, neither `mix` nor `load` makes it compile again. They cost time whether used or not.

    Raises:
        BankError: there is a bank already, or adapters of another library that cannot share a layer with one.
        AdapterError: there is nothing that can carry adapters.
        ConfigError: a capacity below 1.
    """
    if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
        raise ConfigError(f"capacity: must be a whole number of ranks, at least 1; got {capacity!r}")
    modules = modules_of(model)
    config = getattr(getattr(model, "scheduler", None), "config", None)
    prediction = getattr(config, "prediction_type", "")
    bank = AdapterBank(
        modules,
        type(model).__name__,
        prediction="v" if prediction == "v_prediction" else str(prediction),
        timesteps=int(getattr(config, "num_train_timesteps", 1000)),
        base=_origin(model),
        capacity=capacity,
        tokenizer=getattr(model, "tokenizer", None),
    )
    if any(_is_compiled(module) for root in modules.values() for module in root.modules()):
        torch._dynamo.reset()  # graphs made before the hooks came would go on without them
        warnings.warn(
            f"this {type(model).__name__} was compiled before the bank came: it compiles again; attach first, then "
            f"compile",
            stacklevel=2,
        )
    return bank


class AdapterBank:
    """The adapters of one pipeline or module; made by `attach`.

    Several threads may share it: each method waits for the others, and `using` keeps others out for its whole block.
    """

    is_attached = True
    """whether the bank is on its model; once detached it is of no more use"""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        title: str,
        *,
        prediction: str = "",
        timesteps: int = 1000,
        base: str = "",
        capacity: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._modules = dict(modules)
        self._tokenizer = tokenizer
        self._examples: dict[str, tuple[str, ...]] = {}
        self._title, self._prediction, self._base = title, prediction, base
        self._lock = threading.RLock()
        self._adapters: dict[str, Adapter] = {}
        self._mix = Mix()
        self._fusion: Fusion | None = None
        self._branches: dict[str, Branch] = {}
        self._places: dict[str, tuple[Branch, Part]] = {}  # by what adapters name: layers, norms, biases
        self._refuse_banks()
        self._refuse_foreign()
        for component, module in self._modules.items():
            self._find_places(component, module, capacity)
        for branch in self._branches.values():
            branch.bank = weakref.ref(self)
            branch.attach()
        self._conditions = Conditions(self._modules, timesteps=timesteps)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The loaded adapters by name."""
        return dict(self._adapters)

    @property
    def weights(self) -> dict[str, float | Weight]:
        """The adapter weights of the present mix, by name: a number, or the Weight of what is more than a number."""
        weights = {name: self._mix.weights.get(name, Weight(0.0)) for name in self._adapters}
        return {name: w if w.varies or w.blocks else w.value for name, w in weights.items()}

    @property
    def is_fused(self) -> bool:
        """Whether the mix is in the base's weights."""
        return self._fusion is not None

    def load(self, adapter: str | Path | Adapter, name: str, *, strict_base: bool = False) -> None:
        """Load an adapter under a name, with weight 0 until a mix names it.

        An adapter of another fine-tune of this base is loaded with a warning that states how far apart the two are.

        Args:
            adapter: an Adapter, or the path of what `load_adapter` reads.
            strict_base: refuse such an adapter.

        Raises:
            BankError: the name is taken or none, the mix is fused, the bank was detached, or a layer cannot be changed
                live.
            BaseMismatch: layers are missing or have other shapes here, or the base predicts something else.
            AdapterError: the file cannot be read, or the adapter is empty.
            MethodError: the method is no change of weights.
        """
        with self._lock:
            self._refuse_fused("load")
            if not self.is_attached:
                raise BankError("this bank was detached; attach a new one")
            if not isinstance(name, str) or not name:
                raise BankError(f"an adapter's name in the bank is a word; got {name!r}")
            if name in self._adapters:
                raise BankError(
                    f"an adapter called {name!r} is loaded already; unload it or choose another name"
                )
            self._refuse_foreign()
            title = name if isinstance(adapter, Adapter) else Path(str(adapter)).name
            adapter = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, self._modules)
            if not len(adapter):
                raise AdapterError(f"{title} is empty; there is nothing to load")
            check_fits(adapter, self._modules, title, adapter.card.base)
            self._judge_base(adapter, title, strict_base)
            deltas = {
                layer_name: self._delta(layer, layer_name, title) for layer_name, layer in adapter.items()
            }
            self._warn_of_room(deltas, name)
            for layer_name, delta in deltas.items():
                branch, part = self._places[layer_name]
                branch.put(name, part, delta)
            self._adapters[name] = adapter

    def unload(self, name: str) -> None:
        """Take an adapter out.

        Raises:
            BankError: there is none of this name, or the mix is fused.
        """
        with self._lock:
            self._refuse_fused("unload")
            self._known(name)
            del self._adapters[name]
            self._examples.pop(name, None)
            for branch in self._branches.values():
                branch.remove(name)
            self._set(self._mix)

    def mix(self, mix: Mapping[str, Any] | Mix | None = None, /, **weights: Any) -> None:
        """Set the adapter weights; what is not named gets 0.

        Args:
            mix: adapter name -> weight: any finite number, factors by component and block in the form that diffusers'
                `set_adapters` takes, or a Weight with a schedule, a mask, factors per sample.
            weights: shorthand for the same.

        Raises:
            BankError: an unknown name, a weight that is no finite number, or the mix is fused.
            ConfigError: weights for blocks that are not there.
        """
        with self._lock:
            self._refuse_fused("mix")
            self._set(self._understand(mix, weights))

    @contextmanager
    def using(self, mix: Mapping[str, Any] | Mix | None = None, /, **weights: Any) -> Iterator[None]:
        """Mix within a with block; the mix before it comes back after it, live, however it ends.

        Other threads' calls wait for the end of the block, so that what is computed in it has this mix.
        """
        with self._lock:
            before = self._mix
            self.mix(mix, **weights)
            try:
                yield
            finally:
                if self.is_fused:
                    self.unfuse()
                self._set(before)

    @contextmanager
    def batch(self, layout: BatchLayout) -> Iterator[None]:
        """Declare within a with block which row of a batch is which prompt, for weights that depend on it.

        Raises:
            BankError: the mix has weights per sample that are not as many as the prompts.
        """
        with self._lock, self._conditions.layout(layout):
            yield

    def describe(self, name: str, prompts: Sequence[str]) -> None:
        """Give example prompts for an adapter, by which `route` finds it instead of by its card.

        Raises:
            BankError: there is none of this name.
            ConfigError: no list of prompts.
        """
        with self._lock:
            self._known(name)
            routing.check_examples(name, prompts)
            self._examples[name] = tuple(prompts)

    def route(self, prompt: str, *, top_k: int = 2, weighting: routing.Weighting = "softmax") -> Mix:
        """Set the mix by what a prompt is about, and give it; see `mmpeft.routing.route`.

        Adapters are silent while the prompt is looked at.

        Raises:
            BankError: the mix is fused, nothing has a tokenizer and a text encoder, or no adapter can be routed to.
            ConfigError: `top_k` is no positive number, or `weighting` is unknown.
        """
        with self._lock:
            self._refuse_fused("route")
            with self.using({}):
                mix = routing.route(
                    prompt,
                    {name: adapter.card.embedding for name, adapter in self._adapters.items()},
                    self._tokenizer,
                    self._modules.get("text_encoder"),
                    examples=self._examples,
                    top_k=top_k,
                    weighting=weighting,
                )
            self._set(mix)
            return mix

    def fuse(
        self, keep: Literal["copy", "file"] = "copy", *, base_file: str | Path | None = None
    ) -> FusionReport:
        """Put the mix into the base's weights: round(float32(W) + sum of the changes), rounded once.

        The weights that were there come back by `unfuse`. What is saved of the model while it is fused
        (`save_pretrained`, `state_dict`) is the fused weights; copies and pickles of the model alone are fused for
        good.

        Args:
            keep: "copy" keeps what was there in memory. "file" reads it from the base's file again, which costs no
                memory; offered where every byte of the layers is as in the file.
            base_file: the base's folder or .safetensors file, for "file"; none takes where the model was loaded from.

        Returns:
            The share of each layer's change that rounding lost.

        Raises:
            BankError: the mix is fused already, all zero or varies in time or place; weights cannot be changed
                (quantised, offloaded), or are not those of the file.
        """
        if keep not in ("copy", "file"):
            raise BankError(f"keep is 'copy' or 'file'; got {keep!r}")
        if base_file is not None and keep != "file":
            raise BankError("base_file is read with keep='file' alone; say so, or leave it out")
        with self._lock:
            if self.is_fused:
                raise BankError("the mix is fused already; unfuse it first")
            self._refuse_varying()
            if not any(branch.is_active for branch in self._branches.values()):
                raise BankError("there is nothing to fuse: every adapter weight is 0; call mix first")
            self._refuse_foreign()
            file = (base_file or self._base) if keep == "file" else None
            if file == "":
                raise BankError(
                    f"this {self._title} was not loaded from files; give base_file, or use keep='copy'"
                )
            self._fusion, report = fusing.fuse(self._branches, file)
            for branch in self._branches.values():
                branch.is_silent = True
            return report

    def unfuse(self, *, lose_edits: bool = False) -> None:
        """Put back the weights that were there before `fuse`, byte for byte; the mix goes on live.

        Args:
            lose_edits: even if that undoes what others changed in the weights since.

        Raises:
            BankError: nothing is fused; since then the model changed its float type, weights were changed, or the
                base's file.
        """
        with self._lock:
            if self._fusion is None:
                raise BankError("nothing is fused")
            self._fusion.check(lose_edits=lose_edits)
            self._fusion.undo()
            self._fusion = None
            for branch in self._branches.values():
                branch.is_silent = False

    def detach(self) -> None:
        """Leave the model as it was found: unfuse if fused, forget the adapters, remove the hooks."""
        with self._lock:
            if self.is_fused:
                self.unfuse()
            for branch in self._branches.values():
                branch.detach()
            self._conditions.detach()
            self._branches.clear()
            self._places.clear()
            self._adapters.clear()
            self._examples.clear()
            self._mix = Mix()
            self.is_attached = False

    def weights_digest(self) -> str:
        """Give the SHA-256 of all weights of the bank's modules, names included."""
        sha = hashlib.sha256()
        for component, module in sorted(self._modules.items()):
            for name, tensor in sorted(module.state_dict().items()):
                sha.update(f"{component}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(stored_bytes(tensor))
        return sha.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        for branch in self._branches.values():
            branch.bank = weakref.ref(self)

    def _find_places(self, component: str, module: nn.Module, capacity: int | None) -> None:
        for disk, (live, part) in live_parameters(component, module).items():
            owner = f"{component}.{disk.removesuffix('.bias') if part == 'bias' else disk}"
            if owner not in self._branches:
                branch = _branch_of(module.get_submodule(live), owner, capacity)
                if branch is None:
                    continue
                self._branches[owner] = branch
            self._places[f"{component}.{disk}"] = self._branches[owner], part

    def _understand(self, mix: Mapping[str, Any] | Mix | None, weights: Mapping[str, Any]) -> Mix:
        named = mix.weights if isinstance(mix, Mix) else {} if mix is None else mix
        if not isinstance(named, Mapping):
            raise BankError(f"a mix is adapter names with their weights; got {mix!r}")
        for name in {**named, **weights}:
            self._known(name)
        try:
            wanted = Mix.of(mix, **weights)
        except ConfigError as error:
            raise BankError(str(error)) from error
        for name, weight in wanted.weights.items():
            try:
                weight.check(self._places)
            except ConfigError as error:
                raise ConfigError(f"the weight of {name!r}: {error}") from error
        return wanted

    def _set(self, mix: Mix) -> None:
        mix = Mix({name: weight for name, weight in mix.weights.items() if name in self._adapters})
        self._conditions.set_mix(mix)
        varying = {name for name, weight in mix.weights.items() if weight.varies}
        for layer, branch in self._branches.items():
            if branch.names:
                weights = {name: mix.at(name, layer) for name in branch.names}
                branch.mix(weights, self._conditions if varying.intersection(branch.names) else None)
        self._mix = mix

    def _delta(self, layer_adapter: LayerAdapter, name: str, title: str) -> Delta:
        if name not in self._places:
            raise BankError(
                f"{title} changes {name}, whose kind of layer cannot be changed live; bake it instead"
            )
        branch, part = self._places[name]
        try:
            if not layer_adapter.needs_weight:
                return layer_adapter.delta()
            weight = branch.read(part)
            if weight is None:
                raise BankError(
                    f"{layer_adapter.method} needs the weight of {name}, which is quantised or offloaded here"
                )
            return layer_adapter.delta(weight.cpu())
        except MethodError as error:
            raise MethodError(f"{title}: {error}") from error

    def _warn_of_room(self, deltas: Mapping[str, Delta], name: str) -> None:
        lacking = {
            layer: missing
            for layer, delta in deltas.items()
            if (missing := self._places[layer][0].lacks_room_for(self._places[layer][1], delta))
        }
        if lacking:
            layer, missing = next(iter(lacking.items()))
            warnings.warn(
                f"{name} has no room in what was reserved: {missing} at {layer}; a compiled model compiles again",
                stacklevel=3,
            )

    def _judge_base(self, adapter: Adapter, title: str, strict: bool) -> None:
        if adapter.card.fingerprint is None:
            return
        whole = Fingerprint.from_json(adapter.card.fingerprint)
        readable = {
            name: getattr(branch.layer, part)
            for name, (branch, part) in self._places.items()
            if branch.is_readable(part)
        }
        trained = Fingerprint(whole.prediction, {n: s for n, s in whole.layers.items() if n in readable})
        here = Fingerprint.of(
            {name: readable[name] for name in trained.layers}, self._prediction or whole.prediction
        )
        verdict = compare(trained, here)
        said = verdict.judge(title, adapter.card.base, f"this {self._title}", strict=strict)
        if said:
            warnings.warn(said, stacklevel=3)

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

    def _refuse_varying(self) -> None:
        for name, weight in self._mix.weights.items():
            kinds = {
                "the timestep": weight.schedule is not None,
                "the place in the image": weight.mask is not None,
                "the sample": weight.samples is not None,
                "the branch of guidance": weight.conditional_only,
            }
            if varies := [kind for kind, does in kinds.items() if does]:
                raise BankError(
                    f"cannot fuse: the weight of {name!r} varies with {' and '.join(varies)}, and fused weights are "
                    f"the same for all; mix live instead"
                )

    def _refuse_banks(self) -> None:
        """Refuse a second bank; take off what a copied or unpickled model carries of a bank that it came without."""
        hooks = [
            getattr(hook, "func", hook)
            for root in self._modules.values()
            for module in root.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        branches = [hook for hook in hooks if isinstance(hook, Branch)]
        if any(branch.bank is not None and branch.bank() is not None for branch in branches):
            raise BankError(f"this {self._title} has a bank already; use it, or detach it first")
        for owner in (*branches, *(getattr(hook, "__self__", None) for hook in hooks)):
            if isinstance(owner, Branch | Conditions):
                owner.detach()


def _branch_of(layer: nn.Module, name: str, capacity: int | None) -> Branch | None:
    if is_adaptable(layer) or isinstance(layer, nn.Conv2d):
        return LayerBranch(layer, name, capacity)
    return NormBranch(layer, name, capacity) if is_norm(layer) else None


def _origin(model: Any) -> str:
    """Give the folder or hub name that a model was loaded from; "" if it was not."""
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return str(name) if isinstance(name, str | Path) else ""


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
