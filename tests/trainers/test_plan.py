import json

import pytest
import torch
from PIL import Image

import mmpeft
from mmpeft.errors import DataError
from mmpeft.trainers.cost import Cost, Speed, count, measure_speed


@pytest.fixture
def images(tmp_path):
    """Six captioned pictures, four square and two wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        size = (96, 48) if number > 3 else (64, 64)
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red cat {number}")
    return folder


def plan(images, base, out, measure=False, **settings):
    settings = {"base.precision": "fp32", "train.batch_size": 2, "train.steps": 10, **settings}
    return mmpeft.plan(images, base=str(base), out=out, overrides=settings, measure=measure)


def test_the_plan_says_data_memory_disk_and_time_and_trains_nothing(images, tiny_sd_folder, tmp_path):
    report = plan(images, tiny_sd_folder, tmp_path / "out")
    assert report.errors == ()
    assert report.trainable_parameters > 0
    assert report.epochs == pytest.approx(10 / 3, abs=0.01)
    assert all(size >= 0 for size in [*report.memory.values(), *report.disk.values()])
    assert report.seconds["training"] > 0
    text = report.text()
    for words in (
        "6 images",
        "memory: about",
        "disk: about",
        "time: about",
        "estimated, on a machine that does nothing",
    ):
        assert words in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact_sheet.png", "plan.json"]
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["peak_bytes"] == report.peak_bytes


def test_what_is_said_of_the_disk_is_what_training_writes(images, tiny_sd_folder, tmp_path):
    settings = {"train.checkpoint_every": 1, "train.keep_checkpoints": 2, "method.targets": ["all"]}
    said = plan(images, tiny_sd_folder, tmp_path / "plan", **settings).disk
    mmpeft.train(
        images,
        base=str(tiny_sd_folder),
        out=tmp_path / "run",
        overrides={
            "base.precision": "fp32",
            "train.batch_size": 2,
            "train.steps": 10,
            "data.flip": True,
            **settings,
        },
    )

    def written(*names):
        files = [file for name in names for file in (tmp_path / "run").glob(name) if file.is_file()]
        return sum(file.stat().st_size for file in files)

    # Every file has a header of some hundred bytes, and one of some thousand for each layer's names.
    assert said["adapter"] < written("adapter/**/*.safetensors") < 2 * said["adapter"]
    assert said["checkpoints"] * 2 / 3 < written("checkpoints/**/*.safetensors") < 2 * said["checkpoints"]


def test_errors_in_the_data_are_all_told_and_do_not_stop_the_plan(images, tiny_sd_folder, tmp_path):
    (images / "7.png").write_bytes(b"no picture")
    (images / "8.png").write_bytes(b"no picture either")
    report = plan(images, tiny_sd_folder, tmp_path / "out", measure=True)
    assert [finding.file for finding in report.errors] == ["7.png", "8.png"]
    assert report.measured is None
    assert "training would stop at once: 2 errors in the data" in report.text()


def test_a_folder_without_images_is_an_error(tiny_sd_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no image in"):
        plan(tmp_path / "empty", tiny_sd_folder, tmp_path / "out")


def test_measuring_takes_a_step_of_every_bucket_and_leaves_the_parameters_alone(
    images, tiny_sd_folder, tmp_path
):
    report = plan(images, tiny_sd_folder, tmp_path / "out", measure=True)
    assert set(report.measured.seconds) == {str(use.bucket) for use in report.lint.buckets}
    assert len(report.measured.seconds) == 2
    assert report.measured.peak_bytes > report.memory["libraries, base and adapter"] // 2
    assert set(report.measured.attention) >= {"sdpa", "eager"}
    mean = sum(report.measured.seconds.values()) / 2
    assert report.seconds["training"] == pytest.approx(10 * mean)
    assert "the fastest is --attention" in report.text()


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"train.batch_size": 4}, True),
        ({"base.gradient_checkpointing": True}, False),
        ({"components.unet.train": True, "components.text_encoder.train": True}, True),
    ],
)
def test_the_memory_of_a_step_follows_the_settings(images, tiny_sd_folder, tmp_path, settings, more):
    step = "gradients and activations of a step"
    plain = plan(images, tiny_sd_folder, tmp_path / "plain").memory[step]
    changed = plan(images, tiny_sd_folder, tmp_path / "changed", **settings).memory[step]
    assert changed > plain if more else changed < plain


def test_latents_are_not_counted_when_every_visit_crops_anew(images, tiny_sd_folder, tmp_path):
    report = plan(images, tiny_sd_folder, tmp_path / "out", **{"data.crop": "random"})
    assert report.disk["latents"] == 0


def test_the_count_of_a_linear_layer_is_known_by_hand():
    layer = torch.nn.Linear(32, 8, bias=False)

    def compute():
        torch.autograd.grad(layer(torch.zeros(4, 32)).sum(), [layer.weight])

    cost = count(compute)
    assert cost.flops == 2 * (2 * 4 * 32 * 8)  # forward, and the weight's gradient
    assert layer.weight.grad is None


def test_the_peak_counts_what_lives_at_once_and_no_more():
    def compute():
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + 1  # the one before goes

    assert count(compute).peak_bytes == 2 * 4000
    assert count(lambda: [torch.zeros(1000) for _ in range(5)]).peak_bytes == 5 * 4000


def test_attention_on_the_cpu_is_counted():
    def compute():
        query, key, value = torch.zeros(3, 2, 4, 16, 8)
        torch.nn.functional.scaled_dot_product_attention(query, key, value)

    assert count(compute).flops == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_time_is_the_slower_of_arithmetic_and_memory_and_the_calls():
    speed = Speed(flops=100.0, bytes=10.0, seconds_per_operation=0.0)
    assert speed.seconds(Cost(flops=200.0, operations=3, moved_bytes=10, peak_bytes=0)) == 2.0
    assert speed.seconds(Cost(flops=100.0, operations=3, moved_bytes=50, peak_bytes=0)) == 5.0
    slow_calls = Speed(flops=100.0, bytes=10.0, seconds_per_operation=1.0)
    assert slow_calls.seconds(Cost(0.0, 3, 0, 0)) > slow_calls.seconds(Cost(0.0, 2, 0, 0)) > 0


def test_the_speed_of_this_machine_is_within_what_machines_do():
    speed = measure_speed(torch.device("cpu"), torch.float32, seconds=0.04)
    assert speed.flops > 1e8
    assert speed.bytes > 1e7
    assert 0 < speed.seconds_per_operation < 1
