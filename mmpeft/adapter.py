"""What training makes: layer adapters by layer name, with a card that says where they come from; saved and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmpeft import adapter_file
from mmpeft.adapter_card import AdapterCard
from mmpeft.base_modules import bound_layers, check_fits, modules_of
from mmpeft.disk.safetensors_file import stored_bytes
from mmpeft.errors import AdapterError, ConfigError
from mmpeft.injection import shapes
from mmpeft.layer_adapter import LayerAdapter, by_component
from mmpeft.plugins import near_miss


class Adapter(Mapping[str, LayerAdapter]):
    """Layer adapters by layer name, with a card."""

    def __init__(self, layer_adapters: Mapping[str, LayerAdapter], card: AdapterCard | None = None) -> None:
        self._layer_adapters = dict(sorted(layer_adapters.items()))
        self.card = card or AdapterCard()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, sorted, each with its component in front."""
        return tuple(self._layer_adapters)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that have at least one layer here, sorted."""
        return tuple(by_component(self))

    def component(self, name: str) -> dict[str, LayerAdapter]:
        """Give one component's layer adapters, their names without the component in front."""
        return by_component(self).get(name, {})

    @property
    def digest(self) -> str:
        """SHA-256 of layer names, methods, tensors as stored, and alphas; the same in every file format."""
        sha = hashlib.sha256()
        for name, layer in self._layer_adapters.items():
            sha.update(f"{name} {layer.method} {layer.settings}".encode())
            for part, tensor in sorted(layer.tensors.items()):
                sha.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(stored_bytes(tensor))
        return sha.hexdigest()

    def __getitem__(self, layer: str) -> LayerAdapter:
        try:
            return self._layer_adapters[layer]
        except KeyError:
            hint = near_miss(layer, list(self.layers)) if len(self) else "; the adapter is empty"
            raise AdapterError(f"the adapter has no layer {layer!r}{hint[:200]}") from None

    def get(self, layer: str, default: Any = None) -> Any:
        """Give a layer's adapter, or the default; the mapping's own would not know our error."""
        return self._layer_adapters.get(layer, default)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layer_adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer_adapters)

    def __len__(self) -> int:
        return len(self._layer_adapters)

    def bound(self, modules: Mapping[str, nn.Module], title: str = "the adapter") -> Adapter:
        """Give the adapter with its layers knowing the weights of a base, by reference, where they need them.

        Args:
            modules: of the base, by component.
            title: what errors call the adapter.

        Raises:
            BaseMismatch: it does not fit.
        """
        check_fits(self, modules, title, self.card.base)
        return Adapter(bound_layers(self, modules), self.card)

    def save(self, folder: str | Path, files: Mapping[str, bytes] | None = None) -> Path:
        """Write the native folder, which plain diffusers and plain PEFT load; see `mmpeft.adapter_file.save`."""
        return adapter_file.save(self, self.card, folder, files)


def load_adapter(
    path: str | Path, base: Any = None, *, base_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Adapter:
    """Read an adapter: a native, diffusers or PEFT folder, or a .safetensors file in their, kohya's or LyCORIS's names.

    Args:
        base: a pipeline, its folder, a module, or modules by component name. With it every layer must exist there
            in the same shape, a PEFT adapter finds its component, any name of kohya's can be read, and layers whose
            change depends on the base's weight know it; without it names are taken as they are.
        base_shapes: where the base is known by its files alone: what it has, by name on disk with the component. Names
            are read as with `base`; whether the adapter fits is left to the caller.

    Raises:
        ConfigError: `path` is no path.
        AdapterError: there is no such file, or it is a pickle.
        FormatError: it is broken, or a key in it is unknown; the sentence names the key and the likely reason.
        BaseMismatch: it does not fit `base`.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(
            f"an adapter is read from the path of a folder or a file; got {type(path).__name__}"
        )
    file = adapter_file.weights_file(Path(path))
    modules = None if base is None else modules_of(base)
    there = base_shapes if modules is None else shapes(modules)
    adapter = Adapter(*adapter_file.read(file, there, modules))
    return adapter if modules is None else adapter.bound(modules, file.name)
