"""Starting training: thread settings before torch loads, one process or several, and how those end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mmpeft.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare_threads(processes: int = 1) -> None:
    """Set how torch's threads wait and how many there are; a variable that the user set stays. Call before torch loads.

    Waiting threads that spin make every step 20 to 40 times slower as soon as anything else runs on the cores, so they
    sleep (OMP_WAIT_POLICY). Several processes divide the cores (OMP_NUM_THREADS).
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))


def run_processes(arguments: Sequence[str], processes: int, *, grace: float = 20.0) -> int:
    """Run `python <arguments>` in several processes that find each other through torch.distributed, and wait for them.

    Each gets RANK, WORLD_SIZE and their kin in its environment, as under torchrun. Ctrl-C and SIGTERM go to all
    of them once each, so that they stop after the same step. When one fails, the others are ended: they
    would wait for it for ever.

    Args:
        arguments: after the interpreter's name: ["-m", "mmpeft.cli", "train", ...].
        grace: seconds that the others have to end by themselves once one of them failed.

    Returns:
        0, or the exit code of the first process that failed (128 + the signal's number for one that a signal ended).
    """
    prepare_threads(processes)
    shared = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _forwarded(ranks):
            for rank in range(processes):
                environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: a Ctrl-C of the terminal must reach a rank through us alone, not twice.
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        env=environment,
                        start_new_session=True,
                        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                    )
                )
            return _wait(ranks, grace)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def accelerator(processes: int = 1) -> "Accelerator":
    """Open Accelerate on the GPUs where there are any, else on the CPU.

    Raises:
        ConfigError: another number of processes runs (`accelerate launch --cpu` starts one, whatever it is told).
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    # The other ranks wait in a collective while the first one validates, draws previews and saves.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    opened = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    if opened.num_processes != processes:
        raise ConfigError(
            f"train.processes: the recipe asks for {processes}, and {opened.num_processes} "
            f"{'is' if opened.num_processes == 1 else 'are'} running; start the run with "
            f"mmpeft train --processes {processes}"
        )
    return opened


def leave(code: int) -> None:
    """End a process of a multi-process run past the interpreter's own exit; do nothing in a single one.

    gloo's threads abort some ranks when the interpreter tears itself down after all work is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch.distributed

    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            _end(ranks, grace)
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    deadline = time.monotonic() + grace
    # Ranks that stop for the same reason (a signal, a non-finite loss) end by themselves a moment later.
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def _forwarded(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
