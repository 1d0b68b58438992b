"""Seeing a run: what is watched, summed over iterations and processes, and where it is written.

    RUN/metrics.jsonl    one line per --log-every iterations
    RUN/tensorboard/     the same curves and the picture grids, if the package tensorboard is installed

    name               what it is                                                           what it should look like
    loss               mean over the batch, per value of x0                                 falls; never NaN
    loss_t0 .. loss_t3 the same by quarters of t, from data to noise                        the last is the largest
    share_jump         share of samples with s < t                                          0 at tau = 0, then 0.5
    lambda             geometric mean of Eq. 17 over them                                   grows with tau
    w                  mean of lambda / (1 + lambda), the weight of x_self                  grows with tau, stays below 1
    delta_norm         root mean square of Delta per value, the self-evaluation signal      a few % of the data's own size
    fake_loss          s.8, in the auxiliary stage                                          near the loss at small t
    grad_norm          before clipping, mean                                                steady; peaks are clipped
    images_per_s, mfu  over all processes; share of the machine's own matrix-product peak   steady
    data_wait          share of the time spent waiting for data                             near 0
    skipped            samples that could not be read so far                                constant or slowly rising
    nonfinite          iterations whose update was left out so far                          0
"""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

BINS = 4  # of t


class Meter:
    """Sums what the loss reports, on the device and without waiting for it; one reduction over processes a record."""

    NAMES = ("n", "loss", "jumps", "log_lambda", "evaluated", "w", "delta_norm", "fakes", "fake_loss",
             *(f"{kind}_t{b}" for b in range(BINS) for kind in ("n", "loss")))  # fmt: skip

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64 if self.device.type != "mps" else torch.float32, device=self.device)
        self.flops, self.began = 0.0, time.perf_counter()

    def add(self, stats: dict[str, Tensor], flops: float) -> None:
        """Take one micro-batch's stats (as losses.SelfE and baselines.IMM return them) and its operations."""
        t, s, loss = stats["t"], stats["s"], stats["loss"]
        zero, jump = torch.zeros((), device=self.device), s < t
        lam = ((t - s) / ((1 - t) * (1 - s)).clamp_min(1e-12)).clamp_min(1e-12)
        row = [zero + len(t), loss.sum(), jump.sum(), torch.where(jump, lam.log(), 0.0).sum()]
        for kind, name in (("evaluated", "delta_norm"), ("fakes", "fake_loss")):
            values = stats.get(name)
            row += [zero + (len(values) if values is not None else 0)]
            row += [stats["w"].sum() if "w" in stats else zero] if kind == "evaluated" else []
            row += [values.sum() if values is not None else zero]
        for b in range(BINS):
            inside = (t >= b / BINS) & ((t < (b + 1) / BINS) | (b == BINS - 1))
            row += [inside.sum(), torch.where(inside, loss, 0.0).sum()]
        self.sums += torch.stack([value.to(self.sums.dtype) for value in row])
        self.flops += flops

    def record(self, world: int, extra: list[float], peak: float) -> tuple[dict[str, float], list[float]]:
        """(the means since the last call, the sums of `extra` over processes). All processes must call it together.

        peak is the machine's matrix-product rate of one process in FLOP/s.
        """
        seconds = time.perf_counter() - self.began
        sums = torch.cat([self.sums, torch.tensor([self.flops, *extra], dtype=self.sums.dtype, device=self.device)])
        if world > 1:
            dist.all_reduce(sums)
        *values, flops = sums.tolist()[: len(self.NAMES) + 1]
        v = dict(zip(self.NAMES, values))
        result = {"loss": v["loss"] / v["n"], "share_jump": v["jumps"] / v["n"]}
        result |= {f"loss_t{b}": v[f"loss_t{b}"] / v[f"n_t{b}"] for b in range(BINS) if v[f"n_t{b}"]}
        if v["jumps"]:
            result["lambda"] = float(torch.tensor(v["log_lambda"] / v["jumps"]).exp())
        if v["evaluated"]:
            result |= {"w": v["w"] / v["evaluated"], "delta_norm": v["delta_norm"] / v["evaluated"]}
        if v["fakes"]:
            result["fake_loss"] = v["fake_loss"] / v["fakes"]
        result |= {"mfu": flops / seconds / (peak * world), "seconds": seconds}
        totals = sums.tolist()[len(self.NAMES) + 1 :]
        self.clear()
        return result, totals


class Log:
    """RUN/metrics.jsonl and, if it is installed, TensorBoard. Only the first process has one."""

    def __init__(self, run: Path):
        self.file = open(run / "metrics.jsonl", "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(run / "tensorboard")

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, record["step"])

    def grid(self, sheet: Image.Image, step: int) -> None:
        if self.board:
            import numpy as np

            self.board.add_image("grid", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
