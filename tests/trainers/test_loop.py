import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_task import TinyTask, content, values

from mmpeft.config import TrainSettings
from mmpeft.data.batches import steps_per_epoch
from mmpeft.errors import ConfigError, DataError, TrainingError
from mmpeft.trainers.loop import train


def run(task: TinyTask, out: Path, *, resume=False, validate_every=None, recipe=None, **settings):
    chosen = TrainSettings(**{"steps": 12, "learning_rate": 1e-2, **settings})
    told = {f"train.{key}": value for key, value in chosen.model_dump(mode="json").items()}
    return train(
        task,
        chosen,
        seed=0,
        out=out,
        recipe={**told, **(recipe or {})},
        resume=resume,
        validate_every=validate_every,
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_it_really_learns(tmp_path: Path, optimizer: str):
    rate = 1.0 if optimizer == "prodigy" else 2e-2
    task = TinyTask(learning_rates=(rate, rate))
    before = task.validate()
    result = run(task, tmp_path, optimizer=optimizer, learning_rate=rate, steps=150)
    after = task.validate()
    assert after < 0.6 * before
    assert result.steps == 150
    assert result.final_loss < 0.3
    assert not result.stopped_early


def test_every_epoch_sees_every_sample_once_and_short_batches_are_kept(tmp_path: Path):
    task = TinyTask()
    epoch_steps = steps_per_epoch(task.groups, 4)
    run(task, tmp_path, steps=2 * epoch_steps, batch_size=2, accumulate=2)
    for epoch in range(2):
        seen = [index for _, e, indices in task.seen if e == epoch for index in indices]
        assert sorted(seen) == list(range(12))


def test_a_batch_of_four_equals_two_accumulated_twice(tmp_path: Path):
    whole, split = TinyTask(), TinyTask()
    run(whole, tmp_path / "whole", batch_size=4)
    run(split, tmp_path / "split", batch_size=2, accumulate=2)
    # 7 and 5 samples of two buckets: each epoch has a step of 3 and one of 1. Float32 sums in another order.
    assert {len(indices) for _, _, indices in whole.seen} == {4, 3, 1}
    torch.testing.assert_close(values(split), values(whole), rtol=1e-4, atol=1e-6)


def test_metrics_follow_the_schedule(tmp_path: Path):
    run(TinyTask(learning_rates=(1e-2, 4e-2)), tmp_path, steps=4, schedule="linear")
    assert [line["learning_rate/second"] for line in lines(tmp_path)] == pytest.approx(
        [0.04, 0.03, 0.02, 0.01]
    )
    assert [line["learning_rate/first"] for line in lines(tmp_path)] == pytest.approx(
        [0.01, 0.0075, 0.005, 0.0025]
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_a_group_that_stopped_stays_bit_for_bit(tmp_path: Path, optimizer: str):
    short, long = TinyTask(stop_after=(0.5, 1.0)), TinyTask(stop_after=(0.25, 1.0))
    run(short, tmp_path / "short", steps=4, optimizer=optimizer)
    run(long, tmp_path / "long", steps=8, optimizer=optimizer)
    # Both stop after step 2; weight decay and momentum would move it later.
    assert torch.equal(short.first.weight, long.first.weight)
    assert not torch.equal(short.second.weight, long.second.weight)
    assert all(p.requires_grad and p.grad is None for p in long.first.parameters())


def test_a_run_in_which_everything_stops_early_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="stop_after: all components stop learning early"):
        run(TinyTask(stop_after=(0.5, 0.5)), tmp_path)


def test_what_is_saved_is_the_moving_average(tmp_path: Path):
    plain, averaged = TinyTask(), TinyTask()
    run(plain, tmp_path / "plain")
    run(averaged, tmp_path / "averaged", ema=0.9, validate_every=5)
    checkpoints = [tmp_path / name / "checkpoints/step-000012" for name in ("plain", "averaged")]
    trained = [(path / "parameters.safetensors").read_bytes() for path in checkpoints]
    assert trained[0] == trained[1]  # validating and saving the average leaves the training alone
    saved = safetensors.torch.load_file(tmp_path / "averaged/adapter/weights.safetensors")
    average = safetensors.torch.load_file(checkpoints[1] / "ema.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, average[name])
    # The task is left with what was saved.
    assert torch.equal(averaged.first.weight, average["first.weight"])
    assert not torch.equal(averaged.first.weight, plain.first.weight)


def test_a_run_that_is_finished_and_grows_equals_the_longer_run(tmp_path: Path):
    run(TinyTask(dropout=0.2), tmp_path / "grown", steps=5, ema=0.9)
    run(TinyTask(dropout=0.2), tmp_path / "grown", steps=9, ema=0.9, resume=True)
    run(TinyTask(dropout=0.2), tmp_path / "whole", steps=9, ema=0.9)
    assert content(tmp_path / "grown/adapter") == content(tmp_path / "whole/adapter")


def test_changes_on_resume_are_listed(tmp_path: Path, capsys):
    run(TinyTask(), tmp_path, steps=5)
    run(TinyTask(), tmp_path, steps=9, keep_checkpoints=3, resume=True)
    said = capsys.readouterr().err
    assert "changed since the checkpoint: train.keep_checkpoints: 2 -> 3" in said
    assert "changed since the checkpoint: train.steps: 5 -> 9 (the learning rate stays constant)" in said
    assert "resumed from step-000005" in said


def test_a_resume_that_makes_another_run_is_refused(tmp_path: Path):
    run(TinyTask(), tmp_path, steps=5)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 4 -> 3 \(a step would have 3 samples"):
        run(TinyTask(), tmp_path, batch_size=3, resume=True)
    with pytest.raises(ConfigError, match="training samples or their buckets"):
        run(TinyTask(groups=(0,) * 12), tmp_path, resume=True)
    with pytest.raises(ConfigError, match="has checkpoints of another run"):
        run(TinyTask(), tmp_path)
    assert content(tmp_path) == before


def test_a_broken_checkpoint_is_said_and_the_one_before_taken(tmp_path: Path, capsys):
    run(TinyTask(dropout=0.2), tmp_path / "run", steps=6, checkpoint_every=2)
    expected = content(tmp_path / "run/adapter")
    (tmp_path / "run/checkpoints/step-000006/optimizer.safetensors").write_bytes(b"torn")
    run(TinyTask(dropout=0.2), tmp_path / "run", steps=6, checkpoint_every=2, resume=True)
    said = capsys.readouterr().err
    assert "passed over checkpoint step-000006: optimizer.safetensors is not what was written" in said
    assert "resumed from step-000004" in said
    assert content(tmp_path / "run/adapter") == expected
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_given_checkpoint_is_the_one_that_is_taken(tmp_path: Path, capsys):
    run(TinyTask(), tmp_path, steps=6, checkpoint_every=2, keep_checkpoints=3)
    run(TinyTask(), tmp_path, steps=6, checkpoint_every=2, resume=tmp_path / "checkpoints/step-000002")
    assert "resumed from step-000002" in capsys.readouterr().err
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]


def test_a_loss_that_is_not_finite_names_the_file_and_saves_nothing_over(tmp_path: Path):
    task = TinyTask(poison=5)
    with pytest.raises(TrainingError) as caught:
        run(task, tmp_path, batch_size=1, accumulate=4, checkpoint_every=1, steps=30)
    text = str(caught.value)
    step = task.seen[-1][0]
    assert (
        f"loss is inf at step {step + 1} (learning_rate 0.01), on picture-5.png; nothing was saved over"
        in text
    )
    assert "--train.learning_rate 0.001" in text
    assert torch.isfinite(values(task)).all()
    names = [path.name for path in (tmp_path / "checkpoints").glob("*")]
    assert not any(name > f"step-{step:06d}" for name in names)
    assert not (tmp_path / "adapter").exists()


def test_the_best_by_validation_is_kept(tmp_path: Path):
    result = run(TinyTask(validation=[3.0, 1.0, 2.0]), tmp_path, steps=6, validate_every=2)
    assert (result.best_step, result.best_loss, result.validation_loss) == (4, 1.0, 2.0)
    assert (tmp_path / "best/card.txt").read_text().startswith("4 [('best_loss', 1.0), ('best_step', 4)")
    assert (tmp_path / "adapter/card.txt").read_text().startswith("6 ")


def test_rising_validation_under_falling_training_loss_is_called_overfitting(tmp_path: Path, capsys):
    run(TinyTask(validation=[1.0, 1.1, 1.2, 1.3, 1.4]), tmp_path / "over", steps=50, validate_every=10)
    assert capsys.readouterr().err.count("overfitting: the validation loss rose at the last 3 looks") == 1
    run(TinyTask(validation=[1.0, 1.1, 0.9, 1.0, 1.1]), tmp_path / "well", steps=50, validate_every=10)
    assert "overfitting" not in capsys.readouterr().err


def test_previews_are_drawn_at_the_start_every_so_often_and_at_the_end(tmp_path: Path):
    settings = TrainSettings(steps=5)
    train(TinyTask(), settings, seed=0, out=tmp_path, recipe={}, preview_every=2)
    drawn = sorted(path.parent.name for path in (tmp_path / "previews").glob("*/0.png"))
    assert drawn == [f"step-{step:06d}" for step in (0, 2, 4, 5)]


def test_tensorboard_gets_the_curves_and_the_pictures(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = TrainSettings(steps=4, tracker="tensorboard")
    train(TinyTask(), settings, seed=0, out=tmp_path, recipe={}, validate_every=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]
    assert [event.step for event in events.Images("preview/0")] == [0, 4]


def test_without_a_terminal_it_says_ten_lines(tmp_path: Path, capsys):
    run(TinyTask(), tmp_path, steps=40)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == 10
    assert said[-1].startswith("step 40 of 40: loss ")


def test_another_number_of_processes_than_the_recipes_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"asks for 2, and 1 is running; .*mmpeft train --processes 2"):
        run(TinyTask(), tmp_path, processes=2)


def test_a_task_without_samples_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no sample"):
        run(TinyTask(groups=()), tmp_path)
