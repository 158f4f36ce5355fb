import pytest

from mmpeft.errors import ConfigError
from mmpeft.trainers.recipe_changes import changes, require_resumable

OLD = {
    "out": "a",
    "seed": 0,
    "base.name": "pocket",
    "method.rank": 8,
    "train.steps": 100,
    "train.schedule": "cosine",
    "train.batch_size": 4,
    "train.accumulate": 1,
    "train.processes": 1,
    "train.keep_checkpoints": 2,
    "components.unet.learning_rate": None,
}


def judged(**new):
    new = {key.replace("__", "."): value for key, value in new.items()}
    return changes(OLD, {**OLD, **new})


def test_an_unchanged_recipe_has_no_changes():
    assert judged() == []


@pytest.mark.parametrize(
    "new",
    [{"seed": 1}, {"base__name": "x"}, {"method__rank": 4}, {"data__images": "b"}, {"train__steps": 99}],
)
def test_what_makes_another_run_is_refused_by_name(new):
    found = judged(**new)
    with pytest.raises(
        ConfigError, match=next(iter(new)).replace("__", r"\.") + ": .* -> .*new run in another out"
    ):
        require_resumable(found)


def test_every_refused_change_is_named():
    with pytest.raises(ConfigError, match=r"base\.name: .*; seed: 0 -> 7"):
        require_resumable(judged(seed=7, base__name="x", out="b"))


@pytest.mark.parametrize(
    "new",
    [
        {"out": "b"},
        {"train__keep_checkpoints": 5},
        {"preview__every": 3},
        {"components__unet__learning_rate": 1e-5},
    ],
)
def test_what_leaves_the_run_what_it_is_may_change(new):
    found = judged(**new)
    assert [change.key for change in found] == [next(iter(new)).replace("__", ".")]
    require_resumable(found)


def test_growing_steps_says_what_the_learning_rate_does():
    (change,) = judged(train__steps=200)
    assert change.allowed
    assert "longer schedule" in change.note
    (change,) = changes({**OLD, "c.stop_after": 0.5}, {**OLD, "c.stop_after": 0.5, "train.steps": 200})
    assert "what had stopped may learn again" in change.note


def test_a_step_may_be_split_otherwise_but_not_change_its_size():
    require_resumable(judged(train__batch_size=2, train__processes=2))
    with pytest.raises(ConfigError, match="a step would have 8 samples instead of 4"):
        require_resumable(judged(train__processes=2))
