"""Seeing a run: what is watched, summed over iterations and processes, and where it is written.

RUN/metrics.jsonl    a line per --log-every iterations, and one for each update left out, with its samples' keys

name               what it is                                                        what it should look like
loss               mean over the batch, per value of x0                              falls; never NaN
loss_t0 .. loss_t3 the same by quarters of t, from data to noise                     all fall; both ends are largest
share_jump         share of samples with s < t                                       0 at tau = 0, then 0.5
w                  mean of lambda / (1 + lambda) over them, the share of x_self      grows with tau, stays below 1
delta_norm         root mean square of Delta per value, the self-evaluation signal   some % of the data's size
fake_loss          s.8, in the auxiliary stage                                       near the loss at small t
grad_norm          before clipping, mean                                             steady; peaks are clipped
iterations_per_s   and images_per_s, over all processes                              steady
mfu                share of the machine's own matrix-product peak                    steady
data_wait          share of the time spent waiting for data, mean over processes     near 0
skipped            samples that could not be read, over all processes, since the
                   run began or was resumed                                          constant or slowly rising
nonfinite          iterations whose update was left out so far                       0
"""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine import errors

BINS = 4  # of t


class Meter:
    """Sums what the loss reports, on the device and without waiting for it; one reduction over processes a record.

    An iteration's micro-batches are `add`ed, and then counted by `keep` or forgotten by `drop`.
    """

    NAMES = "n loss below evaluated mix delta_norm fakes fake_loss".split()
    NAMES += [f"{kind}_t{b}" for b in range(BINS) for kind in ("n", "loss")]
    NAMES += ["flops", "iterations", "grad_norm"]

    def __init__(self, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums, self.pending = (torch.zeros(len(self.NAMES), dtype=dtype, device=device) for _ in range(2))
        self.began, self.waited_before = time.perf_counter(), 0.0

    def add(self, stats: dict[str, Tensor], flops: float) -> None:
        """Take one micro-batch's stats and its operations.

        Every objective gives t, s and loss, detached, one value per sample or group. Those that evaluate themselves
        give lam and delta_norm besides, one value per sample with s < t, and with the auxiliary term fake_loss.
        """
        t, s, loss = stats["t"], stats["s"], stats["loss"]
        evaluated, fakes = stats.get("delta_norm", t[:0]), stats.get("fake_loss", t[:0])
        lam = stats.get("lam", t[:0])

        def count(x: Tensor) -> Tensor:  # len(x), already on the device
            return torch.ones_like(x).sum()

        row = [count(t), loss.sum(), (s < t).sum(), count(evaluated)]
        row += [(lam / (1 + lam)).sum(), evaluated.sum(), count(fakes), fakes.sum()]
        for b in range(BINS):
            inside = (t >= b / BINS) & ((t < (b + 1) / BINS) | (b == BINS - 1))
            row += [inside.sum(), torch.where(inside, loss, 0.0).sum()]
        row += [self.sums.new_full((), flops), *self.sums.new_zeros(2)]  # `keep` fills in the other two
        self.pending += torch.stack([x.to(self.sums.dtype) for x in row])

    def keep(self, grad_norm: Tensor) -> None:
        """Count the iteration."""
        self.pending[-2] += 1
        self.pending[-1] += grad_norm
        self.sums += self.pending
        self.drop()

    def drop(self) -> None:
        """Forget the iteration: its numbers are not finite."""
        self.pending.zero_()

    def record(self, world: int, peak: float, waited: float) -> dict[str, float]:
        """The means since the last record; all processes must call it together.

        peak is one process's matrix-product rate in FLOP/s; waited its seconds of waiting for data since the run began.
        Empty when no iteration was kept.
        """
        seconds = time.perf_counter() - self.began
        wait, self.waited_before = waited - self.waited_before, waited
        sums = torch.cat([self.sums, self.sums.new_tensor([wait])])
        if world > 1:
            dist.all_reduce(sums)
        *values, wait = sums.tolist()
        v = dict(zip(self.NAMES, values))
        self.sums.zero_()
        self.began = time.perf_counter()
        if not v["n"]:
            return {}
        iterations = v["iterations"] / world
        result = {"loss": v["loss"] / v["n"], "share_jump": v["below"] / v["n"]}
        result |= {f"loss_t{b}": v[f"loss_t{b}"] / v[f"n_t{b}"] for b in range(BINS) if v[f"n_t{b}"]}
        if v["evaluated"]:
            result |= {"w": v["mix"] / v["evaluated"], "delta_norm": v["delta_norm"] / v["evaluated"]}
        if v["fakes"]:
            result["fake_loss"] = v["fake_loss"] / v["fakes"]
        # n counts IMM's groups, not pictures; so the rate is of iterations, and the loop knows their batch.
        return result | {
            "grad_norm": v["grad_norm"] / v["iterations"],
            "iterations_per_s": iterations / seconds,
            "mfu": v["flops"] / seconds / (peak * world),
            "data_wait": wait / world / seconds,
        }


class Log:
    """RUN/metrics.jsonl. Only the first process has one."""

    def __init__(self, run: Path):
        # Unbuffered: after a full disk, closing has nothing left to write
        self.file = open(run / "metrics.jsonl", "ab", buffering=0)

    def write(self, record: dict) -> None:
        """Raises UserError where the disk is full."""
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            way_on = "make room if the disk is full; --resume goes on from the last state"
            raise errors.UserError(
                f"{self.file.name} cannot be written ({error.strerror}); {way_on}"
            ) from error

    def close(self) -> None:
        self.file.close()
