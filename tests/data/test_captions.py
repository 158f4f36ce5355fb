import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.data.captions import contains_words, final_caption, without_words

TAG = st.text("abcdefgh ", min_size=1, max_size=6).map(str.strip).filter(bool)


def read(caption, *, index=0, epoch=0, **changes):
    settings = {
        "trigger": None,
        "trigger_position": "last",
        "dropout": 0.0,
        "shuffle_tags": False,
        "keep_tags": 0,
        "seed": 0,
    }
    return final_caption(caption, **{**settings, **changes}, epoch=epoch, index=index)


@pytest.mark.parametrize(
    ("caption", "position", "expected"),
    [
        ("a cat", "last", "a cat, ink style"),
        ("a cat", "first", "ink style, a cat"),
        ("", "last", "ink style"),
        (None, "first", "ink style"),
        ("a cat in Ink  Style", "last", "a cat in Ink  Style"),
        ("a pink style cat", "last", "a pink style cat, ink style"),
        ("ink styles", "last", "ink styles, ink style"),
    ],
)
def test_trigger_is_joined_unless_its_words_are_there(caption, position, expected):
    assert read(caption, trigger="ink style", trigger_position=position) == expected


@pytest.mark.parametrize("trigger", [None, "", "  "])
def test_without_a_trigger_the_caption_stays(trigger):
    assert read("a cat, asleep", trigger=trigger) == "a cat, asleep"


@given(
    st.text(max_size=40), st.sampled_from(["sks", "ink style", "<c++>"]), st.sampled_from(["first", "last"])
)
def test_every_caption_has_the_trigger_and_has_it_once(caption, trigger, position):
    once = read(caption, trigger=trigger, trigger_position=position)
    assert contains_words(once, trigger)
    assert read(once, trigger=trigger, trigger_position=position) == once


@given(st.lists(TAG, max_size=8), st.integers(0, 9), st.integers(0, 5), st.integers(0, 50))
def test_shuffle_keeps_the_first_tags_and_loses_none(tags, keep, epoch, index):
    read_tags = read(", ".join(tags), shuffle_tags=True, keep_tags=keep, epoch=epoch, index=index)
    shuffled = read_tags.split(", ") if read_tags else []
    assert shuffled[:keep] == tags[:keep]
    assert sorted(shuffled) == sorted(tags)


def test_shuffle_draws_another_order_at_each_visit_and_the_same_at_the_same():
    caption = "a, b, c, d, e, f"
    orders = [
        read(caption, shuffle_tags=True, epoch=epoch, index=index) for epoch in range(5) for index in range(5)
    ]
    assert len(set(orders)) > 20
    assert orders[7] == read(caption, shuffle_tags=True, epoch=1, index=2)
    assert orders[7] != read(caption, shuffle_tags=True, epoch=1, index=2, seed=1)


def test_dropout_takes_its_share_and_the_trigger_along():
    seen = [read("a cat", trigger="sks", dropout=0.3, index=index) for index in range(2000)]
    assert set(seen) == {"", "a cat, sks"}
    # Five standard deviations of 2000 draws at 0.3.
    assert abs(seen.count("") / 2000 - 0.3) < 0.052


def test_dropout_of_zero_and_one_leave_nothing_to_chance():
    assert {read("a cat", dropout=0.0, index=index) for index in range(200)} == {"a cat"}
    assert {read("a cat", dropout=1.0, index=index) for index in range(200)} == {""}


def test_dropout_does_not_change_the_order_of_what_stays():
    caption = "a, b, c, d, e"
    for index in range(40):
        dropped = read(caption, shuffle_tags=True, dropout=0.5, index=index)
        assert dropped in ("", read(caption, shuffle_tags=True, index=index))


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("a sks cat, grinning", "sks", "a cat, grinning"),
        ("pear, in the style of ink", "in the style of  Ink", "pear"),
        ("ink", "ink", ""),
        ("inkwell, thinking", "ink", "inkwell, thinking"),
        ("a cat", "", "a cat"),
    ],
)
def test_words_are_taken_out_whole(text, words, left):
    assert without_words(text, words) == left
