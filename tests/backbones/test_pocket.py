import pytest

from mmpeft.backbones import pocket
from mmpeft.errors import DataError


def test_the_embedded_base_is_there():
    assert (pocket.pocket_folder() / "model_index.json").is_file()
    assert (pocket.clip_folder() / "config.json").is_file()
    assert (pocket.judges_folder() / "concept_judge.json").is_file()


def test_every_image_folder_has_pictures_with_captions():
    names = pocket.image_folders()
    assert {"cat", "high-contrast"} <= set(names)
    for name in names:
        for part in ("train", "held_out"):
            pictures = sorted((pocket.image_folder(name) / part).glob("*.png"))
            assert pictures
            assert all(picture.with_suffix(".txt").is_file() for picture in pictures)


def test_a_mistyped_folder_suggests_the_right_one():
    with pytest.raises(
        DataError, match="no bundled image folder is called 'high-contrst'; did you mean 'high-contrast'"
    ):
        pocket.image_folder("high-contrst")
