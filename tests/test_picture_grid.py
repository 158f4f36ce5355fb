import numpy as np
import pytest
from PIL import Image, ImageFont

from mmpeft.errors import ConfigError
from mmpeft.picture_grid import PAPER, enlarged, picture_grid, save_picture, shortened, wrapped

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def box_of(sheet, colour):
    """Left, upper, right, lower edge of everything that has exactly one colour."""
    lower, right = (int(axis.max()) + 1 for axis in np.nonzero((np.asarray(sheet) == colour).all(-1)))
    upper, left = (int(axis.min()) for axis in np.nonzero((np.asarray(sheet) == colour).all(-1)))
    return left, upper, right, lower


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_are_kept():
    sheet = picture_grid([[plain(RED, (50, 30)), plain(BLUE, (300, 20))]], cell=128)
    left, upper, right, lower = box_of(sheet, RED)
    assert (right - left, lower - upper) == (100, 60)
    left, upper, right, lower = box_of(sheet, BLUE)
    assert (right - left, lower - upper) == (300, 20)


def test_enlarging_changes_no_pixel():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    large = np.asarray(enlarged(noise, 20))
    assert large.shape == (12, 18, 3)
    assert (large[::3, ::3] == np.asarray(noise)).all()


def test_rows_stand_below_each_other_and_columns_side_by_side():
    sheet = picture_grid([[plain(RED), plain("white")], [plain("white"), plain(BLUE)]], cell=8)
    red, blue = box_of(sheet, RED), box_of(sheet, BLUE)
    assert red[2] < blue[0]
    assert red[3] < blue[1]


def test_labels_are_drawn_beside_the_pictures_and_not_over_them():
    bare = picture_grid([[plain(RED)], [plain(BLUE)]], cell=64)
    labelled = picture_grid(
        [[plain(RED)], [plain(BLUE)]], row_labels=["a red apple", "water"], column_labels=["ink 0.8"], cell=64
    )
    for colour in (RED, BLUE):
        left, upper, right, lower = box_of(labelled, colour)
        assert (right - left, lower - upper) == (64, 64)
    left, upper, _, _ = box_of(labelled, RED)
    ink = (np.asarray(labelled.convert("L")) < 128) & (np.asarray(labelled) != RED).all(-1)
    assert ink[:upper, left:].any()
    assert ink[upper:, :left].any()
    assert labelled.width > bare.width
    assert bare.getpixel((0, 0)) == Image.new("RGB", (1, 1), PAPER).getpixel((0, 0))


def test_a_row_may_be_shorter_than_the_others():
    sheet = picture_grid([[plain(RED), plain(RED)], [plain(BLUE)]], cell=8)
    assert box_of(sheet, BLUE)[0] == box_of(sheet, RED)[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rows": []}, "needs at least one picture"),
        ({"rows": [[plain(RED)]], "row_labels": ["a", "b"]}, "the grid has 1 rows; got 2 labels"),
        ({"rows": [[plain(RED)]], "column_labels": []}, "the grid has 1 columns; got 0 labels"),
    ],
)
def test_a_grid_that_does_not_fit_is_an_error(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        picture_grid(**arguments)


def test_text_is_broken_within_its_width_and_says_when_it_goes_on():
    font = ImageFont.load_default(14)
    lines = wrapped("a red cat sits on a blue chair and looks at the sea " * 3, 90, font, 3)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 90 for line in lines)
    assert lines[-1].endswith("…")
    assert wrapped("a cat", 90, font, 3) == ["a cat"]
    short = shortened("photographs/holiday/0001.png", 90, font)
    assert font.getlength(short) <= 90
    assert short.startswith("p")
    assert short.endswith("g")


def test_a_picture_lies_where_it_was_asked_for_or_there_is_a_sentence(tmp_path):
    save_picture(plain(RED), tmp_path / "new" / "red.png")
    assert Image.open(tmp_path / "new" / "red.png").getpixel((0, 0)) == RED
    (tmp_path / "folder.png").mkdir()
    for path, sentence in (
        (tmp_path / "red.xyz", "a picture's name ends in .png, .jpg or .webp; got '.xyz'"),
        (tmp_path / "red", "got 'no ending'"),
        (tmp_path / "new" / "red.png" / "red.png", "there can be no folder"),
        (tmp_path / "folder.png", "cannot write .*folder.png"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            save_picture(plain(RED), path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder.png", "new", "red.png"]
