import json

import numpy as np
import pytest
from PIL import Image

from mmpeft import plugins
from mmpeft.config import Recipe
from mmpeft.data.image_folder import ImageFolder, ImageFolderSettings
from mmpeft.errors import ConfigError, DataError


def draw(path, seed=0, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def scan(folder, **settings):
    return ImageFolder.scan(folder, ImageFolderSettings(**settings))


def captions(folder):
    return {record.name: record.caption for record in folder.records}


def said(folder, level=None):
    return [
        f"{finding.file}: {finding.message}"
        for finding in folder.problems
        if level is None or finding.level == level
    ]


def test_the_plugin_door_gives_this_dataset():
    assert plugins.get("dataset", "image_folder") is ImageFolder
    recipe = Recipe.build({"out": "x", "data.images": "photos", "data.trigger": "ink style"})
    assert isinstance(recipe.data, ImageFolderSettings)
    assert recipe.data.trigger == "ink style"


def test_every_setting_has_help():
    assert all(
        field.description for name, field in ImageFolderSettings.model_fields.items() if name != "name"
    )


def test_a_background_that_is_no_colour_is_refused():
    with pytest.raises(ConfigError, match=r"data\.background: .*'whit' is no colour"):
        Recipe.build({"out": "x", "data.background": "whit"})


@pytest.mark.parametrize("ending", [".txt", ".caption", ".TXT"])
def test_sidecar_gives_the_caption(tmp_path, ending):
    draw(tmp_path / "a.png")
    write(tmp_path / f"a{ending}", "\ufeff  a  small\tcat \n")
    folder = scan(tmp_path)
    assert captions(folder) == {"a.png": "a small cat"}
    assert folder.records[0].caption_source == f"a{ending}"
    assert folder.problems == ()


def test_lines_of_a_sidecar_are_one_caption_and_that_is_said(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "one\ntwo\n")
    folder = scan(tmp_path)
    assert captions(folder) == {"a.png": "one two"}
    assert said(folder, "note") == ["a.txt: has several lines; they are read as one caption"]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_jsonl_gives_captions(tmp_path, column):
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub" / "b.png", 1)
    rows = [{"file_name": "a.png", column: "a\u2028b"}, {"file_name": "sub/b.png", column: "second"}]
    write(tmp_path / "metadata.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    folder = scan(tmp_path)
    assert captions(folder) == {"a.png": "a b", "sub/b.png": "second"}
    assert folder.problems == ()


@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_csv_gives_captions(tmp_path, column):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", 1)
    write(tmp_path / "metadata.csv", f'file_name,{column}\na.png,"a cat, asleep"\nb.png,"two\nlines"\n')
    folder = scan(tmp_path)
    assert captions(folder) == {"a.png": "a cat, asleep", "b.png": "two lines"}
    assert folder.problems == ()


def test_metadata_speaks_for_the_folder_it_stands_in(tmp_path):
    draw(tmp_path / "sub" / "a.png")
    write(tmp_path / "sub" / "metadata.csv", "file_name,text\na.png,near\n")
    write(tmp_path / "metadata.csv", "file_name,text\nsub/a.png,far\n")
    folder = scan(tmp_path)
    assert captions(folder) == {"sub/a.png": "near"}
    assert said(folder, "warning") == [
        "sub/a.png: has two captions: 'near' in sub/metadata.csv, which is used, and 'far' in metadata.csv"
    ]


def test_kohya_folder_gives_repeats_and_caption(tmp_path):
    draw(tmp_path / "3_sks cat" / "a.png")
    draw(tmp_path / "3_sks cat" / "deeper" / "b.png", 1)
    draw(tmp_path / "plain" / "c.png", 2)
    write(tmp_path / "3_sks cat" / "deeper" / "b.txt", "its own")
    folder = scan(tmp_path, repeats=2)
    assert captions(folder) == {
        "3_sks cat/a.png": "sks cat",
        "3_sks cat/deeper/b.png": "its own",
        "plain/c.png": None,
    }
    assert [record.repeats for record in folder.records] == [6, 6, 2]
    assert folder.samples == (0,) * 6 + (1,) * 6 + (2,) * 2
    assert said(folder) == ["3_sks cat: the folder's name says: 3 visits per epoch, caption 'sks cat'"]


def test_kohya_folder_counts_only_below_the_data_folder(tmp_path):
    draw(tmp_path / "5_sks dog" / "a.png")
    folder = scan(tmp_path / "5_sks dog")
    assert captions(folder) == {"a.png": None}
    assert folder.records[0].repeats == 1


def test_folder_that_is_named_after_a_year_is_warned_of(tmp_path):
    draw(tmp_path / "2024_summer" / "a.png")
    assert said(scan(tmp_path), "warning") == [
        "2024_summer: the folder's name says: 2024 visits per epoch, caption 'summer'; rename it if that is not meant"
    ]


def test_folder_with_no_repeats_is_left_out_and_said(tmp_path):
    draw(tmp_path / "0_off" / "a.png")
    draw(tmp_path / "b.png", 1)
    folder = scan(tmp_path)
    assert folder.samples == (1,)
    assert any("0 visits per epoch" in sentence for sentence in said(folder, "warning"))
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"none of the 1 images .* can be trained on, for example 0_off"):
        scan(tmp_path)


def test_one_caption_for_all_fills_the_gaps_and_that_is_said(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", 1)
    write(tmp_path / "a.txt", "its own")
    folder = scan(tmp_path, caption="a drawing in the style of sks")
    assert captions(folder) == {"a.png": "its own", "b.png": "a drawing in the style of sks"}
    assert folder.records[1].caption_source == "data.caption"
    assert said(folder) == [
        "None: data.caption is not used for 1 of 2 images: they have captions of their own"
    ]


def test_sources_come_in_the_order_that_is_documented(tmp_path):
    image = tmp_path / "4_sks cat" / "a.png"
    draw(image)
    write(tmp_path / "4_sks cat" / "metadata.csv", "file_name,text\na.png,from csv\n")
    write(tmp_path / "4_sks cat" / "metadata.jsonl", '{"file_name": "a.png", "text": "from jsonl"}')
    write(image.with_suffix(".caption"), "from caption")
    write(image.with_suffix(".txt"), "from txt")
    seen = []
    for used in ("a.txt", "a.caption", "metadata.jsonl", "metadata.csv"):
        folder = scan(tmp_path, caption="from settings")
        seen.append(
            (folder.records[0].caption, sum("has two captions" in line for line in said(folder, "warning")))
        )
        (tmp_path / "4_sks cat" / used).unlink()
    assert seen == [("from txt", 3), ("from caption", 2), ("from jsonl", 1), ("from csv", 0)]
    assert captions(scan(tmp_path, caption="from settings")) == {"4_sks cat/a.png": "sks cat"}
    (tmp_path / "4_sks cat").rename(tmp_path / "plain")
    assert captions(scan(tmp_path, caption="from settings")) == {"plain/a.png": "from settings"}
    assert captions(scan(tmp_path)) == {"plain/a.png": None}


def test_empty_sidecar_stays_empty_although_another_source_speaks(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", " \n")
    write(tmp_path / "metadata.csv", "file_name,text\na.png,from csv\n")
    folder = scan(tmp_path, caption="for all")
    assert captions(folder) == {"a.png": ""}
    assert said(folder, "warning") == [
        "a.png: has two captions: '' in a.txt, which is used, and 'from csv' in metadata.csv"
    ]


@pytest.mark.parametrize(
    ("name", "content", "level", "message"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png"}',
            "warning",
            "line 1 has no caption in a column called text or caption",
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "error", "line 1 has no caption"),
        ("metadata.jsonl", '{"text": "x"}', "error", "line 1 has no file_name"),
        ("metadata.jsonl", '\n{"file_name": "a.png",', "error", "line 2 is not JSON"),
        ("metadata.jsonl", "[1]", "error", "line 1 is no JSON object"),
        (
            "metadata.jsonl",
            '{"file_name": "../z.png", "text": "x"}',
            "warning",
            "names ../z.png, which is no image",
        ),
        ("metadata.csv", "file_name,text\nz.png,x\n", "warning", "line 2 names z.png, which is no image"),
        ("metadata.csv", 'file_name,text\na.png,"open\n', "error", "cannot be read: unexpected end of data"),
        ("orphan.txt", "hello", "note", "is the caption of no image"),
        ("b.zip", "", "note", "is neither image nor caption"),
    ],
)
def test_what_is_wrong_with_other_files_is_said(tmp_path, name, content, level, message):
    draw(tmp_path / "a.png")
    write(tmp_path / name, content)
    folder = scan(tmp_path)
    (finding,) = folder.problems
    assert finding.level == level
    assert finding.file == name
    assert message in finding.message


def test_caption_that_is_no_utf8_is_an_error_by_name(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    (sentence,) = said(scan(tmp_path), "error")
    assert sentence.startswith("a.txt: cannot be read as UTF-8 text")


def test_unreadable_images_are_named_and_the_others_stay(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.jpg").write_bytes(b"")
    folder = scan(tmp_path)
    assert [record.name for record in folder.records] == ["a.png"]
    assert [(finding.level, finding.file) for finding in folder.problems] == [
        ("error", "b.png"),
        ("error", "c.jpg"),
    ]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"none of the 2 images .*b\.png: cannot be read as an image"):
        scan(tmp_path)


def test_frames_after_the_first_are_said(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert said(scan(tmp_path), "note") == ["a.gif: has 3 frames; only the first is used"]


def test_missing_and_empty_folders_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"the image folder .*absent does not exist; data\.images names"):
        scan(tmp_path / "absent")
    write(tmp_path / "notes.md", "x")
    with pytest.raises(DataError, match=r"there is no image in .*1 other files\); images end in .*\.png"):
        scan(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        scan(tmp_path / "notes.md")


def test_order_is_that_of_the_names_and_hidden_files_are_passed_over(tmp_path):
    for place, name in enumerate(
        ["b/z.png", "a.png", "b/c/d.png", ".hidden.png", ".git/e.png", "__MACOSX/f.png"]
    ):
        draw(tmp_path / name, place)
    folder = scan(tmp_path)
    assert [record.name for record in folder.records] == ["a.png", "b/c/d.png", "b/z.png"]
    assert folder.problems == ()
    assert scan(tmp_path) == folder


def test_links_are_followed_without_going_round_in_circles(tmp_path):
    draw(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert [record.name for record in scan(tmp_path / "data").records] == ["link/a.png"]


def test_size_and_digest_are_of_the_upright_picture(tmp_path):
    draw(tmp_path / "a.png", size=(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tmp_path / "a.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    plain, turned = scan(tmp_path).records
    assert plain.size == turned.size == (20, 10)
    assert plain.digest == turned.digest


def test_digest_tells_pixels_shapes_and_backgrounds_apart(tmp_path):
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (2, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 2), "white").save(tmp_path / "c.png")
    on_white, on_black = scan(tmp_path), scan(tmp_path, background="black")
    a, b, c = (record.digest for record in on_white.records)
    assert a == c
    assert len({a, b, on_black.records[0].digest}) == 3
    assert on_white.digest != on_black.digest


def test_data_digest_depends_on_captions_not_on_names(tmp_path):
    draw(tmp_path / "a.png")
    write(tmp_path / "a.txt", "one")
    first = scan(tmp_path).digest
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    (tmp_path / "a.txt").rename(tmp_path / "z.txt")
    assert scan(tmp_path).digest == first
    write(tmp_path / "z.txt", "two")
    assert scan(tmp_path).digest != first


def test_picture_that_was_changed_since_is_refused(tmp_path):
    draw(tmp_path / "a.png", seed=0)
    folder = scan(tmp_path)
    assert folder.picture(0).size == (20, 10)
    draw(tmp_path / "a.png", seed=1)
    with pytest.raises(DataError, match=r"a\.png was changed since"):
        folder.picture(0)
