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
import re
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
        """What torchrun says. Raises UserError where something else has set it."""
        told = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
        world, rank = (int(text) if re.fullmatch("[0-9]{1,9}", text) else -1 for text in told)
        if not 0 <= rank < world:
            raise errors.UserError(
                f"there is no process of RANK {told[1]!r} among WORLD_SIZE {told[0]!r}: start them "
                "with torchrun, or a single one without these variables"
            )
        return cls(world, rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def connected(self, device: torch.device, patience: float):
        """The processes can talk while the block lasts. They have `patience` seconds to meet; raises UserError then."""
        if self.world > 1:
            place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            others = f"the other {self.world - 1} of {self.world} processes at {place}"
            waiting = threading.Timer(
                5,
                print,
                [f"process {self.rank} waits for {others}, {patience:g} s at most"],
                {"file": sys.stderr},
            )
            waiting.start()
            # Saving and drawing keep the others waiting, for less than that
            hour = datetime.timedelta(hours=1)
            try:
                store, rank, world = next(
                    dist.rendezvous("env://", timeout=datetime.timedelta(seconds=patience))
                )
                store.set_timeout(hour)
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
        if self.world > 1:  # not after an error: the others may be waiting in a reduction, and so would this
            dist.destroy_process_group()

    def gather(self, what) -> list:
        """`what` of every process, in the order of their ranks."""
        everyone = [what] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, what)
        return everyone

    def agree(self, what: dict) -> None:
        """Raise UserError unless all processes say the same: one that resumed elsewhere would drift apart unnoticed."""
        everyone = self.gather(what)
        for rank, other in enumerate(everyone):
            for name in what:
                if other[name] != everyone[0][name]:
                    raise errors.UserError(
                        f"process {rank} has {name} {other[name]}, process 0 has {everyone[0][name]}: "
                        "do all of them see the same --out and --data, and the same code?"
                    )

    def any(self, *flags: torch.Tensor) -> list[bool]:
        """Whether each flag (a 0-d tensor on the run's device) is set on any
        process: all must skip, stop and save alike."""
        told = torch.stack([flag.float() for flag in flags])
        if self.world > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def choose(self, decide):
        """What `decide()` says on rank 0."""
        chosen = [decide()] if self.is_first else [None]
        if self.world > 1:
            dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

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
    ends the process as usual.

    A further SIGTERM does not, because launchers and schedulers may send one after the other, and it would cut the
    saving short; they have SIGKILL for what takes too long.
    """

    def __init__(self):
        self.name, self.number = "", 0
        numbers = [signal.SIGINT, signal.SIGTERM]
        if (
            hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        ):  # Windows has none
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        self.name, self.number = signal.Signals(number).name, number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @contextlib.contextmanager
    def held(self):
        """Block SIGINT in this thread, so that programs started meanwhile inherit the block: a terminal sends Ctrl-C to
        the C++ compiler as well, which would end in its traceback. Any iteration may compile: one with pictures of a
        new size, the first with the auxiliary term. This process still notices the signal and stops after the
        iteration."""
        can = hasattr(signal, "pthread_sigmask")  # not on Windows
        if can:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            if can:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __bool__(self) -> bool:
        return self.name != ""
