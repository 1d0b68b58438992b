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

import programs

ROOT = Path(__file__).parent.parent
SMALL = "--batch-size 4 --device cpu --precision fp32 --no-compile --grid-every 0 --log-every 1".split()
TRAIN = "import train\nfrom engine import errors\nerrors.run(train.main)\n"
TINY = f"import model\nmodel.SIZES['laptop'] = {programs.TINY}\n" + TRAIN

context = multiprocessing.get_context("forkserver")
# What a run imports on its way, too: Adam imports the compiler, which takes longer than a short run.
context.set_forkserver_preload(["train", "torch._dynamo"])


def child(script: str, argv: list[str], environment: dict, outputs: list[str]) -> None:
    """What a forked process does: run the script as if it were train.py, called with these arguments."""
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = ["train.py", *argv]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

    import torch

    torch.set_num_threads(1)
    exec(script, {"__name__": "script"})


def start(world: int, *arguments, script: str = TINY) -> list:
    """`world` processes of one run over gloo on this machine, as multiprocessing has them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group, processes = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, []
    for rank in map(str, range(world)):
        files = [tempfile.NamedTemporaryFile(suffix=".txt") for _ in range(2)]
        environment = group | {"RANK": rank, "LOCAL_RANK": rank}
        what = script, [str(a) for a in arguments], environment, [file.name for file in files]
        processes.append(context.Process(target=child, args=what))
        processes[-1].start()
        processes[-1].files = files
    return processes


def printed(process) -> list[str]:
    """What a process has written to stdout and to stderr."""
    return [Path(file.name).read_text() for file in process.files]


def finish(processes: list, timeout: float = 600) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process, all of them ended; those that outlast the timeout are killed."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join()
    return [(process.exitcode, *printed(process)) for process in processes]


def train(world: int, *arguments, **options) -> list[tuple[int, str, str]]:
    """Run to the end; every process must succeed."""
    results = finish(start(world, *arguments, **options))
    assert all(code == 0 for code, _, _ in results), "\n".join(error[-2000:] for _, _, error in results)
    return results
