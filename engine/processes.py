"""Several processes that make one run: what they exchange, what they decide together, and how they stop.

    ranks = processes.Ranks.of_environment()         # torchrun's WORLD_SIZE and RANK; 1 and 0 without it
    ranks.agree({"iteration": 1200})                 # an error unless all of them say the same
    bad, stop = ranks.any(is_bad, is_stopped)        # true on all where it is true on one
    stop = processes.StopSignal()                    # true after the first Ctrl-C or SIGTERM

Every method of Ranks but `is_first` must be called by all processes together.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine import errors


class Ranks(NamedTuple):
    """How many processes there are, and which one this is. Rank 0 writes, prints and draws."""

    world: int = 1
    rank: int = 0

    @classmethod
    def of_environment(cls) -> "Ranks":
        """What torchrun says; one process without it."""
        return cls(int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def connected(self, device: torch.device, patience: float):
        """The processes can talk while the block lasts. They have `patience` seconds to meet; raises UserError then."""
        if self.world == 1:
            yield
            return
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        others = f"the other {self.world - 1} of {self.world} processes at {place}"
        line = f"process {self.rank} waits for {others}, {patience:g} s at most"
        waiting = threading.Timer(5, print, [line], {"file": sys.stderr})
        waiting.start()
        limit, hour = (datetime.timedelta(seconds=n) for n in (patience, 3600))
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
            store.set_timeout(hour)  # saving and drawing keep the others waiting, for less than that
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=hour)
        except (ValueError, dist.DistError) as error:  # no such address, or a process that never came
            raise errors.UserError(
                f"process {self.rank} did not meet {others} within {patience:g} s "
                f"({str(error).splitlines()[0]}): start all of them with torchrun"
            ) from error
        finally:
            waiting.cancel()
        yield
        dist.destroy_process_group()  # not after an error: the others may be waiting, and so would this

    def gather(self, what) -> list:
        """`what` of every process, in the order of their ranks."""
        everyone = [what] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, what)
        return everyone

    def agree(self, what: dict) -> None:
        """Raise UserError unless all processes say the same: one that resumed elsewhere would drift apart unnoticed."""
        first, *others = self.gather(what)
        for rank, other in enumerate(others, 1):
            for name in what:
                if other[name] != first[name]:
                    raise errors.UserError(
                        f"process {rank} has {name} {other[name]}, process 0 has {first[name]}: "
                        "do all of them see the same --out and --data, and the same code?"
                    )

    def any(self, *flags: torch.Tensor) -> list[bool]:
        """Whether each flag (0-d, on the run's device) is set on any process: all must skip, stop and save alike."""
        found = torch.stack([flag.float() for flag in flags])
        if self.world > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    @contextlib.contextmanager
    def first_alone(self):
        """Rank 0 goes through the block before all others: it makes the index of tar shards, they find it made."""
        if self.world > 1 and not self.is_first:
            dist.barrier()
        yield
        if self.world > 1 and self.is_first:
            dist.barrier()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


class StopSignal:
    """Becomes true at the first SIGINT, SIGTERM or SIGHUP (a closed terminal; nohup has it ignored). A second Ctrl-C
    ends the process as usual; a second SIGTERM does not, because launchers send several, and have SIGKILL."""

    def __init__(self):
        self.name, self.number = "", 0
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        closes = hang_up and signal.getsignal(hang_up) != signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *[hang_up] * bool(closes)):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        self.name, self.number = signal.Signals(number).name, number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @contextlib.contextmanager
    def held(self):
        """Block SIGINT in this thread, and so in programs started meanwhile: a terminal sends Ctrl-C to the compiler as
        well, and any iteration may compile. This process still notices the signal, and stops after the iteration."""
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            yield
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __bool__(self) -> bool:
        return self.name != ""
