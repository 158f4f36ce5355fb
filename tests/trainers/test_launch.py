import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CHILD = Path(__file__).parent / "train_child.py"
LAUNCHED = (
    "import json, sys; from mmpeft.trainers import launch; "
    "sys.exit(launch.run_processes(json.loads(sys.argv[1]), 2, grace=float(sys.argv[2])))"
)


def launch(arguments: list[str], grace: float = 20.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks from a process of its own, as the command line does."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCHED, json.dumps(arguments), str(grace)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def told(out: Path, **train) -> dict:
    return {
        "out": str(out),
        "train": {"steps": 12, "learning_rate": 0.01, "checkpoint_every": 5, **train},
        "validate_every": 5,
    }


def test_two_processes_equal_one_with_short_last_batches(tmp_path: Path):
    two = launch([str(CHILD), json.dumps(told(tmp_path / "two", batch_size=2, processes=2))])
    assert two.returncode == 0, two.stderr
    one = subprocess.run(
        [sys.executable, CHILD, json.dumps(told(tmp_path / "one", batch_size=4))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert one.returncode == 0, one.stderr
    found, expected = (load_file(tmp_path / name / "adapter/weights.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        # Float32 sums in another order; steps of 3 and of 1 sample leave the second process with less or nothing.
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    metrics = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 13))


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_they_resume(tmp_path: Path):
    plan = {
        **told(tmp_path / "run", batch_size=2, processes=2),
        "signals": {"6": [signal.SIGTERM]},
        "signal_rank": 1,
    }
    stopped = launch([str(CHILD), json.dumps(plan)])
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["steps"] < 12
    assert (tmp_path / f"run/checkpoints/step-{report['steps']:06d}").is_dir()
    resumed = launch(
        [str(CHILD), json.dumps({**told(tmp_path / "run", batch_size=2, processes=2), "resume": True})]
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 12


def test_when_one_process_fails_all_end_with_its_code():
    script = "import os, signal, sys; sys.exit(7) if os.environ['RANK'] == '1' else signal.pause()"
    failed = launch(["-c", f"import mmpeft.trainers.launch as l\n{script}"], grace=0.5)
    assert failed.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_process_once(tmp_path: Path, number: int):
    rank = (
        "import os, pathlib, signal\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        f"signal.sigwait([{int(number)}])\n"
        f"again = signal.sigtimedwait([{int(number)}], 0.5)\n"
        # one write, so that two processes' lines cannot mix
        "os.write(1, b'got 1\\n' if again is None else b'got 2\\n')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHED, json.dumps(["-c", rank]), "20"], stdout=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        os.sched_yield()
    parent.send_signal(number)
    output, _ = parent.communicate(timeout=60)
    assert output.splitlines() == ["got 1", "got 1"]
    assert parent.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_no_process_outlives_a_killed_launcher(tmp_path: Path):
    rank = f"import os, pathlib, signal; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); signal.pause()"
    parent = subprocess.Popen([sys.executable, "-c", LAUNCHED, json.dumps(["-c", rank]), "20"])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        os.sched_yield()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(is_running(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "a rank still runs"
        os.sched_yield()


def is_running(pid: int) -> bool:
    try:
        # After the name in brackets: the state; Z is dead and not yet collected.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_find_each_other_and_share_the_cores():
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    script = f"import os; print(*(os.environ[n] for n in {names}), os.environ['OMP_NUM_THREADS'], flush=True)"
    done = launch(["-c", script], OMP_NUM_THREADS="3")
    assert sorted(done.stdout.splitlines()) == ["0 0 2 2 127.0.0.1 3", "1 1 2 2 127.0.0.1 3"]


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ({}, 1, ["PASSIVE", None]),
        ({}, 1000, ["PASSIVE", "1"]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}, 4, ["ACTIVE", "5"]),
    ],
)
def test_threads_are_prepared_without_loading_torch_and_never_over_the_users_word(given, processes, expected):
    script = (
        "import json, os, sys\n"
        "from mmpeft.trainers.launch import prepare_threads\n"
        "names = ['OMP_WAIT_POLICY', 'OMP_NUM_THREADS']\n"
        "before = [os.environ.get(n) for n in names]\n"
        f"prepare_threads({processes})\n"
        "print(json.dumps([before, [os.environ.get(n) for n in names], 'torch' in sys.modules]))\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    before, after, torch_loaded = json.loads(done.stdout)
    assert before == [given.get("OMP_WAIT_POLICY"), given.get("OMP_NUM_THREADS")]  # importing changed nothing
    assert after == expected
    assert not torch_loaded
