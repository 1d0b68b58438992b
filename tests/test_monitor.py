"""engine/monitor.py: what a record says is what the samples say."""

from pathlib import Path

import pytest
import torch

from engine import errors, monitor


def test_the_meter_says_what_the_samples_say():
    torch.manual_seed(1)
    t, u = torch.rand(64), torch.rand(64)
    t[0] = 1.0  # s = t there; pure noise belongs to the last quarter
    s, loss = torch.where(torch.arange(64) % 2 == 0, t, t * u), t**2 + 1
    meter = monitor.Meter(torch.device("cpu"))
    for i in range(0, 64, 16):
        row = {"t": t[i : i + 16], "s": s[i : i + 16], "loss": loss[i : i + 16]}
        row |= {"lam": torch.full((8,), 1 / 3), "delta_norm": torch.full((8,), 3.0)}
        meter.add(row, 5e9)
        meter.keep(torch.tensor(2.0))
        meter.add({name: value * float("nan") for name, value in row.items()}, 5e9)
        meter.drop()  # an iteration that is not finite leaves no trace
    record = meter.record(1, 1e12, 0.0)
    for b in range(4):
        inside = (t >= b / 4) & ((t < (b + 1) / 4) | (b == 3))
        assert record[f"loss_t{b}"] == pytest.approx(loss[inside].mean().item())
    assert record["mfu"] * 1e12 / record["iterations_per_s"] == pytest.approx(5e9)
    # w is a quarter where lambda is a third
    expected = dict(loss=loss.mean().item(), share_jump=0.5, grad_norm=2, w=0.25, delta_norm=3)
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert "fake_loss" not in record
    assert meter.sums.sum() == 0 and meter.record(1, 1e12, 0.0) == {}


def test_two_processes_that_see_the_same_tell_what_one_tells(monkeypatch):
    """All means, and the share of the peak: twice the operations on twice the machine."""
    t = torch.rand(8)
    row = {"t": t, "s": t / 2, "loss": t, "lam": t, "delta_norm": t, "fake_loss": t}
    monkeypatch.setattr(monitor.dist, "all_reduce", lambda sums: sums.mul_(2))
    records = []
    for world in (1, 2):
        monkeypatch.setattr(monitor.time, "perf_counter", iter([0.0, 10.0, 10.0]).__next__)
        meter = monitor.Meter(torch.device("cpu"))
        meter.add(row, 5e12)
        meter.keep(torch.tensor(2.0))
        records.append(meter.record(world, 1e12, 4.0))
    assert records[0] == pytest.approx(records[1])
    rates = [records[0][name] for name in ("mfu", "data_wait", "iterations_per_s")]
    assert rates == pytest.approx([0.5, 0.4, 0.1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_a_full_disk_names_the_file_and_the_way_on(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = monitor.Log(tmp_path)
    with pytest.raises(errors.UserError, match="metrics.jsonl cannot be written .*--resume"):
        log.write({"step": 1})
    log.close()  # and does not complain again
