import json

import numpy as np
import pytest
from PIL import Image

from mmpeft.data.buckets import make_buckets
from mmpeft.data.captions import final_caption
from mmpeft.data.image_folder import ImageFolder, ImageFolderSettings
from mmpeft.data.lint import lint, near_duplicates

POCKET = make_buckets(64, 16)


def picture(seed, size=(96, 96)):
    """Coarse noise: as different from another seed's as two photos."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def words(text):
    """Count a token for each word and one for each end."""
    return len(text.split()) + 2


def look(folder, *, limit=77, step_size=1, **settings):
    chosen = ImageFolderSettings(**settings)
    images = ImageFolder.scan(folder, chosen)
    captions = [
        final_caption(
            record.caption,
            trigger=chosen.trigger,
            trigger_position=chosen.trigger_position,
            dropout=0,
            shuffle_tags=False,
            keep_tags=0,
            seed=0,
            epoch=0,
            index=place,
        )
        for place, record in enumerate(images.records)
    ]
    return lint(
        images,
        POCKET,
        captions=captions,
        token_count=words,
        token_limit=limit,
        step_size=step_size,
        trigger=chosen.trigger,
    )


def found(report):
    return [(finding.level, finding.file, finding.message) for finding in report.findings]


@pytest.fixture
def folder(tmp_path):
    """Two images without fault."""
    for place, name in enumerate("ab"):
        picture(place).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    return tmp_path


def test_a_good_folder_has_nothing_to_say(folder):
    report = look(folder, trigger="ink style")
    assert report.findings == ()
    assert report.errors == ()


def test_unreadable_files_are_errors_by_name_and_come_first(folder):
    picture(2, (20, 20)).save(folder / "a_small.png")
    (folder / "z.png").write_bytes(b"no image")
    report = look(folder)
    assert [finding.level for finding in report.findings] == ["error", "warning", "warning"]
    (error,) = report.errors
    assert error.file == "z.png"
    assert "cannot be read as an image" in error.message


def test_exact_duplicates_are_named_with_their_original(folder):
    picture(0).save(folder / "c.bmp")
    (folder / "c.txt").write_text("picture c")
    ((level, file, message),) = found(look(folder))
    assert (level, file) == ("warning", "c.bmp")
    assert "pixel for pixel the same as a.png" in message


@pytest.mark.parametrize("quality", [30, 90])
def test_recompressed_and_resized_copies_are_near_duplicates(folder, quality):
    picture(0).resize((70, 72)).save(folder / "c.jpg", quality=quality)
    (folder / "c.txt").write_text("picture c")
    picture(0, (128, 128)).save(folder / "d.png")
    (folder / "d.txt").write_text("picture d")
    (level, file, message), (_, other_file, other_message) = found(look(folder))
    assert (level, file, other_file) == ("warning", "c.jpg", "d.png")
    assert "nearly the same as a.png;" in message
    assert "nearly the same as a.png and 1 more;" in other_message


def test_line_drawings_on_white_are_no_near_duplicates(folder):
    for place, name in enumerate("ab"):
        image = Image.new("RGB", (96, 96), "white")
        image.paste("black", (40, 40 + 12 * place, 44, 46 + 12 * place))
        image.save(folder / f"{name}.png")
    assert look(folder).findings == ()


def test_near_duplicates_are_pairs_in_order(folder):
    for name in ("c", "d"):
        picture(0).resize((90, 90)).save(folder / f"{name}.png")
    records = ImageFolder.scan(folder, ImageFolderSettings()).records
    assert near_duplicates(records) == [(0, 2), (0, 3), (2, 3)]
    assert near_duplicates(records[:1]) == []


@pytest.mark.parametrize(
    ("size", "level", "words"),
    [
        ((32, 32), "warning", "only 32x32 pixels, enlarged 2.0 times to fill 64x64"),
        ((60, 64), "note", "60x64 pixels, enlarged a little (1.07 times) to fill 64x64"),
    ],
)
def test_enlarged_images_are_told_with_the_factor(folder, size, level, words):
    picture(0, size).save(folder / "a.png")
    ((found_level, file, message),) = found(look(folder))
    assert (found_level, file) == (level, "a.png")
    assert words in message


def test_images_that_lose_more_than_a_third_are_told(folder):
    picture(0, (300, 100)).save(folder / "a.png")
    ((level, file, message),) = found(look(folder))
    assert (level, file) == ("warning", "a.png")
    # 80x48 has the aspect 5/3: of 3 there stays 5/9.
    assert "300x100 pixels, 44% of it cropped off to fill 80x48" in message
    picture(0, (240, 100)).save(folder / "a.png")
    assert look(folder).findings == ()


def test_frames_after_the_first_are_told(folder):
    picture(0).save(folder / "a.gif", save_all=True, append_images=[picture(3)])
    (folder / "a.png").unlink()
    assert found(look(folder)) == [("note", "a.gif", "has 2 frames; only the first is used")]


def test_missing_and_empty_captions_are_told_with_what_is_read_instead(folder):
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("\n")
    missing, empty = found(look(folder))
    assert missing[:2] == ("warning", "a.png")
    assert missing[2].startswith("has no caption; it is trained without text; write one beside it")
    assert empty == ("warning", "b.png", "has an empty caption; it is trained without text")
    report = look(folder, trigger="sks")
    assert "it is trained with 'sks'" in report.findings[0].message
    assert (report.captions.missing, report.captions.empty, report.captions.distinct) == (1, 1, 1)


def test_long_caption_tells_the_tokens_and_the_words_that_are_cut_off(folder):
    (folder / "a.txt").write_text("one two three four five six")
    ((level, file, message),) = found(look(folder, limit=6))
    assert (level, file) == ("warning", "a.png")
    assert message == "has a caption 2 tokens past the limit of 6; cut off is 'five six'"


def test_trigger_that_is_cut_off_is_an_error(folder):
    (folder / "a.txt").write_text("one two three four")
    report = look(folder, limit=7, trigger="ink style")
    (error,) = report.errors
    assert error.file == "a.png"
    assert error.message.startswith(
        "is trained without the trigger 'ink style': the end of the caption is cut off"
    )
    assert look(folder, limit=7, trigger="ink style", trigger_position="first").errors == ()


def test_caption_without_the_trigger_is_an_error(folder):
    images = ImageFolder.scan(folder, ImageFolderSettings())
    report = lint(
        images,
        POCKET,
        captions=["picture a, sks", "picture b"],
        token_count=words,
        token_limit=77,
        step_size=1,
        trigger="sks",
    )
    assert [(error.file, error.message) for error in report.errors] == [
        ("b.png", "is trained without the trigger 'sks': its caption does not have it")
    ]


def test_bucket_occupancy_counts_images_visits_and_short_steps(folder):
    picture(2, (100, 60)).save(folder / "c.png")
    (folder / "c.txt").write_text("picture c")
    report = look(folder, repeats=3, step_size=4)
    uses = [(str(use.bucket), use.images, use.samples, use.steps, use.short) for use in report.buckets]
    assert uses == [("64x64", 2, 6, 2, 2), ("80x48", 1, 3, 1, 3)]
    ((level, file, message),) = found(report)
    assert (level, file) == ("note", None)
    assert "bucket 80x48 has 3 visits per epoch, fewer than a step's 4" in message


def test_text_names_a_few_of_many_and_the_dict_names_all(folder):
    for place in range(20):
        (folder / f"broken{place:02}.png").write_bytes(b"")
    report = look(folder, step_size=4)
    text = report.text()
    assert "2 images, 2 visits and 1 steps per epoch" in text
    assert "64x64       2       2      1  last step has 2" in text
    assert "captions: 2 different, 0 missing, 0 empty; 4 to 4 tokens, median 4, of 77 that are read" in text
    assert text.count("error: broken") == 5
    assert "error: ... and 15 more like these" in text
    whole = json.loads(json.dumps(report.as_dict()))
    assert len(whole["findings"]) == 21
    assert whole["findings"][0]["file"] == "broken00.png"
    assert whole["buckets"] == [{"bucket": "64x64", "images": 2, "samples": 2, "steps": 1, "short": 2}]
    assert whole["captions"]["token_limit"] == 77


def test_tokens_are_those_of_the_pocket_tokenizer():
    from pathlib import Path

    from transformers import CLIPTokenizer

    import mmpeft.pocket

    root = Path(mmpeft.pocket.__file__).parent
    images = ImageFolder.scan(root / "images" / "cat" / "train", ImageFolderSettings(trigger="sks cat"))
    tokenizer = CLIPTokenizer.from_pretrained(root / "clip")
    captions = [record.caption + " on and on" * 40 for record in images.records]
    report = lint(
        images,
        POCKET,
        captions=captions,
        token_count=lambda text: len(tokenizer(text).input_ids),
        token_limit=tokenizer.model_max_length,
        step_size=4,
        trigger="sks cat",
    )
    assert report.errors == ()
    long = [finding for finding in report.findings if finding.topic == "long caption"]
    assert len(long) == len(images.records)
    for finding, caption in zip(long, captions, strict=True):
        cut = finding.message.rpartition("cut off is ")[2].strip("'")
        kept = caption.removesuffix(cut).strip()
        first_cut = cut.split()[0]
        assert (
            len(tokenizer(kept).input_ids)
            <= report.captions.token_limit
            < len(tokenizer(f"{kept} {first_cut}").input_ids)
        )
