import numpy as np
import pytest
from PIL import Image

from mmpeft.data.buckets import Bucket, choose_bucket, make_buckets
from mmpeft.data.contact_sheet import contact_sheet
from mmpeft.data.image_folder import ImageFolder, ImageFolderSettings
from mmpeft.data.pictures import fit

BUCKETS = make_buckets(64, 16)


def noise(seed, size):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def scan(tmp_path, sizes):
    for place, size in enumerate(sizes):
        noise(place, size).save(tmp_path / f"{place:03}.png")
    return ImageFolder.scan(tmp_path, ImageFolderSettings())


def holds(sheet, part):
    """Tell whether a picture stands somewhere on the sheet, pixel for pixel."""
    whole, part = np.asarray(sheet), np.asarray(part)
    height, width = part.shape[:2]
    corners = np.argwhere((whole == part[0, 0]).all(axis=2))
    return any(np.array_equal(whole[y : y + height, x : x + width], part) for y, x in corners)


def test_sheet_shows_each_crop_as_the_model_sees_it_in_whole_pixels(tmp_path):
    folder = scan(tmp_path, [(64, 64), (200, 90), (30, 50)])
    buckets = [choose_bucket(record.size, BUCKETS) for record in folder.records]
    path = tmp_path / "out" / "sheet.png"
    assert contact_sheet(folder, buckets, ["one", "two " * 60, ""], path) == 3
    with Image.open(path) as sheet:
        for place, bucket in enumerate(buckets):
            times = 192 // max(bucket)
            seen = fit(folder.picture(place), *bucket)
            enlarged = seen.resize((bucket.width * times, bucket.height * times), Image.Resampling.NEAREST)
            assert holds(sheet, enlarged)


def test_sheet_shows_the_offsets_that_are_given(tmp_path):
    folder = scan(tmp_path, [(200, 64)])
    path = tmp_path / "sheet.png"
    contact_sheet(folder, [Bucket(64, 64)], ["x"], path, offsets=[(1.0, 0.0)])
    with Image.open(path) as sheet:
        right = folder.picture(0).crop((136, 0, 200, 64)).resize((192, 192), Image.Resampling.NEAREST)
        assert holds(sheet, right)


def test_large_crops_are_scaled_down(tmp_path):
    folder = scan(tmp_path, [(1024, 512)])
    path = tmp_path / "sheet.png"
    contact_sheet(folder, [Bucket(640, 384)], ["x"], path)
    with Image.open(path) as sheet:
        assert sheet.height < 512


def test_of_many_images_an_even_choice_is_drawn(tmp_path):
    folder = scan(tmp_path, [(8, 8)] * 30)
    path = tmp_path / "sheet.png"
    assert contact_sheet(folder, [Bucket(16, 16)] * 30, ["x"] * 30, path, limit=10) == 10
    with Image.open(path) as sheet:
        view = [
            fit(folder.picture(place), 16, 16).resize((192, 192), Image.Resampling.NEAREST)
            for place in range(30)
        ]
        assert [place for place in range(30) if holds(sheet, view[place])] == list(range(0, 30, 3))


@pytest.mark.parametrize("caption", ["x" * 500, "a " * 500, "ж語🐱" * 50, "\n\n", "two\nlines"])
def test_any_caption_can_be_drawn(tmp_path, caption):
    folder = scan(tmp_path, [(64, 64)])
    assert contact_sheet(folder, [Bucket(64, 64)], [caption], tmp_path / "sheet.png") == 1
