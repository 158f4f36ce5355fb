"""Where the embedded base, its sample images and its judges lie on disk; their licences are beside them."""

from pathlib import Path

from mmpeft.errors import DataError
from mmpeft.plugins import near_miss

_ROOT = Path(__file__).parent.parent / "pocket"


def pocket_folder() -> Path:
    """Give the diffusers folder of the pocket base, a Stable Diffusion model for 64 x 64 pixels."""
    return _ROOT / "sd"


def clip_folder() -> Path:
    """Give the transformers folder of the small CLIP that shares the pocket base's tokenizer."""
    return _ROOT / "clip"


def judges_folder() -> Path:
    """Give the folder of the style judge and the concept judge."""
    return _ROOT / "judges"


def image_folder(name: str) -> Path:
    """Give a bundled image folder: `train/` and `held_out/`, pictures with captions beside them.

    Raises:
        DataError: no bundled folder has this name; the names that exist are listed.
    """
    names = image_folders()
    if name not in names:
        raise DataError(f"no bundled image folder is called {name!r}{near_miss(name, names)}")
    return _ROOT / "images" / name


def image_folders() -> list[str]:
    """List the bundled image folders by name, sorted."""
    return sorted(path.name for path in (_ROOT / "images").iterdir() if path.is_dir())
