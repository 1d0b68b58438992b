"""Starting train.py as several processes, as torchrun does, without the seconds that importing torch takes each time.

A fork server imports train.py once; every process of a run is forked from it, with arguments, environment and standard
streams of its own, and can be signalled and killed like any other.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = "--batch-size 4 --device cpu --precision fp32 --no-compile --grid-every 0 --log-every 1".split()

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "torch.utils.tensorboard"])


def child(program: str, script: str, argv: list[str], environment: dict, out: str, err: str) -> None:
    """What a forked process does: become `python PROGRAM.py ARGV`, or run `script` with these arguments."""
    for number, name in ((1, out), (2, err)):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [f"{program}.py", *argv]
    sys.stdout, sys.stderr = (
        open(1, "w", closefd=False, buffering=1),
        open(2, "w", closefd=False, buffering=1),
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

    import torch

    from engine import errors

    torch.set_num_threads(1)
    if script:
        exec(script, {"__name__": "script"})
    else:
        errors.run(__import__(program).main)


class Process:
    """A running child: the part of subprocess.Popen that the tests need."""

    def __init__(self, program: str, script: str, argv: list[str], environment: dict):
        self.files = [tempfile.NamedTemporaryFile(suffix=".txt") for _ in range(2)]
        arguments = program, script, argv, environment, *(file.name for file in self.files)
        self.process = context.Process(target=child, args=arguments)
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.process.kill()

    def read(self) -> tuple[str, str]:
        return tuple(Path(file.name).read_text() for file in self.files)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.read()[1][-2000:]}")
        return self.read()


def start(world: int, *arguments, program: str = "train", script: str = "") -> list[Process]:
    """`world` processes of one run over gloo on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(Process(program, script, [str(a) for a in arguments], own))
    return processes


def finish(processes: list[Process], timeout: float = 600) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process, all of them ended."""
    end = time.monotonic() + timeout
    try:
        outputs = [process.communicate(end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def train(world: int, *arguments, **options) -> list[tuple[int, str, str]]:
    """Run to the end; every process must succeed."""
    results = finish(start(world, *arguments, **options))
    assert all(code == 0 for code, _, _ in results), "\n".join(error[-2000:] for _, _, error in results)
    return results
