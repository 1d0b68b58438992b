"""The programs that measure and predict: their arithmetic against closed forms, and that they run as typed."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import model
import recipe
from engine import data_speed, errors, loop_speed, scaling
from scale import cache, shards

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------------------
# The time of an iteration on many GPUs
# ------------------------------------------------------------------------------------------------------------
def test_a_ring_moves_every_byte_twice():
    """Each of N processes sends S / N in each of 2 (N - 1) rounds."""
    for world in (2, 3, 8, 256):
        rounds = sum(8e9 / world / 1e11 for _ in range(2 * (world - 1)))
        assert scaling.all_reduce_seconds(8e9, world, 1e11) == pytest.approx(rounds)
        assert scaling.all_reduce_seconds(8e9, world, 1e11, 0.25) == pytest.approx(rounds + 0.25)
    assert scaling.all_reduce_seconds(8e9, 1, 1e11, 0.25) == 0


def test_what_the_backward_pass_hides():
    """A fast network leaves the last bucket, a slow one all but what the backward pass covers after the first."""
    size = 100 * scaling.BUCKET
    whole = scaling.all_reduce_seconds(size, 8, 1e11)
    assert scaling.exposed_seconds(size, 10.0, 8, 1e11) == pytest.approx(whole / 100)
    assert scaling.exposed_seconds(size, 0.0, 8, 1e11) == pytest.approx(whole)
    backward = whole / 2
    assert scaling.exposed_seconds(size, backward, 8, 1e11) == pytest.approx(whole - backward * 99 / 100)
    slow = scaling.exposed_seconds(size, backward, 8, 1e11, 1e-3)
    assert slow == pytest.approx(whole + 0.1 - backward * 99 / 100)  # a latency for each bucket


def test_an_iteration_by_hand():
    """The first stage of 2b on 8 GPUs: 128 pictures of 4 forward passes each, the last 16 of them hide the ring."""
    row = scaling.iteration("2b", 256, 8, 0.5, 4e11)
    forward = model.forward_flops(model.SIZES["2b"], 256, 256)
    assert row["compute"] == pytest.approx(128 * 4 * forward / (0.5 * 989e12)) and row["pictures"] == 128
    assert row["efficiency"] == pytest.approx(row["compute"] / row["seconds"]) and row["micro_batch"] == 16
    assert row["update"] == pytest.approx(14 * 4 * 2.24772e9 / 3.35e12, rel=1e-3)
    assert row["seconds"] == pytest.approx(row["compute"] + row["exposed"] + row["update"])
    one = scaling.iteration("2b", 256, 1, 0.5, 4e11)
    assert one["exposed"] == 0 and one["compute"] == pytest.approx(8 * row["compute"])
    whole = 710_000 * 1024 * 4 * forward / (0.5 * 989e12)  # had all of the run this stage's price
    assert whole == pytest.approx(recipe.RECIPES["2b"].steps * one["compute"])
    sample = 16 * 32 * 32 * 4 + 256 * 4096 * 2 + 768 * 4
    assert row["bytes_per_s"] == pytest.approx(128 * sample / row["seconds"])
    with pytest.raises(errors.UserError, match="does not divide"):
        scaling.iteration("2b", 512, 256, 0.5, 4e11)
    assert scaling.iteration("2b", 256, 256, 0.5, 4e11)["pictures"] == 4


def test_the_share_of_saving():
    """36 GB at 1 GB/s every half hour."""
    bytes_of_a_state = 16 * model.count_parameters(model.SIZES["2b"])
    assert scaling.saving_share("2b", 1e9) == pytest.approx(
        bytes_of_a_state / 1e9 / (1800 + bytes_of_a_state / 1e9)
    )


def test_the_fit_finds_what_made_the_times():
    sizes = [2**n for n in range(10, 25, 2)]
    times = [scaling.all_reduce_seconds(size, 4, 3e9, 2e-4) for size in sizes]
    assert scaling.fit(sizes, times, 4) == pytest.approx((2e-4, 3e9))


def test_processes_that_reduce(tmp_path):
    found = scaling.measure(2, sizes=[2**12, 2**14, 2**16, 2**18], rounds=2)
    assert [row["fitted"] for row in found["rows"]] == [True, False] * 2
    assert (
        all(row["seconds"] > 0 for row in found["rows"])
        and found["worst_error"] >= found["median_error"] >= 0
    )


def test_scaling_as_a_user_types_it():
    result = subprocess.run(
        [sys.executable, "engine/scaling.py", "--bandwidth", "400"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "does not divide" in result.stdout and "97.8%" in result.stdout


def test_scaling_refuses_what_cannot_be(monkeypatch):
    for words in (
        ["--mfu", "2"],
        ["--gpus", "0"],
        ["--bandwidth", "nan"],
        ["--measure", "1"],
        ["--out", "x.json"],
    ):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
        with pytest.raises(errors.UserError):
            scaling.parse_arguments()


# ------------------------------------------------------------------------------------------------------------
# Where the time of the loop goes
# ------------------------------------------------------------------------------------------------------------
def test_the_clock_charges_the_innermost_part():
    clock = loop_speed.Clock()
    clock.reset()
    began = time.perf_counter()
    with clock.part("outer"):
        time.sleep(0.02)
        with clock.part("inner"):
            time.sleep(0.04)
        with pytest.raises(ZeroDivisionError), clock.part("broken"):
            1 / 0
        time.sleep(0.02)
    clock.charge()
    whole = time.perf_counter() - began
    assert clock.open == ["other"] and sum(clock.spent.values()) == pytest.approx(whole, abs=2e-3)
    assert clock.spent["inner"] >= 0.04 and 0.04 <= clock.spent["outer"] <= whole - 0.04


def test_the_loop_is_timed_as_it_runs(tmp_path, monkeypatch):
    """Every part is met, parts make up the whole, and Self-E evaluates where flow matching does not."""
    monkeypatch.setitem(
        model.SIZES,
        "laptop",
        dict(
            width=16,
            heads=2,
            double=1,
            single=1,
            axes=(2, 2, 4),
            channels=3,
            patch=4,
            txt_dim=256,
            vec_dim=256,
        ),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "loop_speed.py",
            "--threads",
            "1",
            "--iterations",
            "2",
            "--rounds",
            "2",
            "--no-compile",
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out.json"),
        ],
    )
    loop_speed.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows["flow matching"]["ratio"] == 1 and set(rows) == set(loop_speed.ROWS)
    for name, row in rows.items():
        assert {
            "forward",
            "backward",
            "encoding",
            "clipping",
            "Adam",
            "average",
            "records",
            "targets and loss",
            "stop or not",
        } <= set(row["parts"])
        assert ("evaluation" in row["parts"]) == (name != "flow matching")
        assert 0 < row["outside"] < 1 and row["hidden"] > 0 and row["waited"] >= 0
        assert sum(row["parts"].values()) == pytest.approx(row["milliseconds"], rel=1.0)
    assert rows["Self-E + aux"]["parts"]["forward"] > rows["Self-E"]["parts"]["forward"] > 0


def test_nothing_stays_patched():
    """The clock's wrappers are gone after it: train.py's parts are what they were."""
    before = (model.Denoiser.forward, torch.Tensor.backward, torch.optim.Adam.step)
    with contextlib.ExitStack() as closing:
        loop_speed.watch_parts(loop_speed.Clock(), closing)
        assert model.Denoiser.forward is not before[0]
    assert (model.Denoiser.forward, torch.Tensor.backward, torch.optim.Adam.step) == before


# ------------------------------------------------------------------------------------------------------------
# How fast data come
# ------------------------------------------------------------------------------------------------------------
def test_the_speed_of_data(tmp_path, monkeypatch):
    """Each rate is positive, each ratio is that of its rates, and what is read is what training would read."""
    monkeypatch.setattr(data_speed, "SIZES", ((320, 240), (240, 320)))
    read, cached = [], []
    right, sample = shards.Shards.read, cache.CachedShards.sample
    monkeypatch.setattr(shards.Shards, "read", lambda self, n, *box: read.append(n) or right(self, n, *box))
    monkeypatch.setattr(cache.CachedShards, "sample", lambda self, g: cached.append(g) or sample(self, g))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "data_speed.py",
            "--pictures",
            "16",
            "--index-size",
            "20000",
            "--rounds",
            "1",
            "--out",
            str(tmp_path / "out.json"),
        ],
    )
    data_speed.main()
    report = json.loads((tmp_path / "out.json").read_text())
    pictures, index = report["pictures"], report["index"]
    assert (
        pictures["from tars / pillow"] == pytest.approx(pictures["from tars"] / pictures["pillow"]) and read
    )
    for state in {"cold", "warm"} & set(report["cache"]):
        rates = report["cache"][state]
        assert (
            rates["samples / plain"] == pytest.approx(rates["samples"] / rates["plain"])
            and min(rates.values()) > 0
        )
    assert (
        set(cached) == set(range(16))
        and report["cache"]["bytes_of_a_sample"] > 2 * 256 * 4096 + 4 * 16 * 32 * 32
    )
    assert (
        index["samples"] == 20_000 and index["bytes"] >= index["index_bytes"] > 20_000 * shards.ROW.itemsize
    )
    assert index["far_seconds"] > 0 and index["start_seconds"] > 0


def test_a_source_from_an_index_is_that_of_its_tars(tmp_path, monkeypatch):
    """The same order, buckets and fingerprint, whether a folder is named or its index given."""
    monkeypatch.setattr(data_speed, "SIZES", ((320, 240), (240, 320)))
    tars = data_speed.make_tars(tmp_path, 16)
    by_name, by_index = (shards.Shards(place, 64, 4) for place in (tars, shards.read_index(tars)))
    assert by_name.fingerprint == by_index.fingerprint and by_name.buckets == by_index.buckets
    assert [by_name.sample(g).key for g in range(40)] == [by_index.sample(g).key for g in range(40)]


def test_a_photograph_is_one(tmp_path):
    """The same bytes every time, of the size that is said, and not smooth to the last bit."""
    content = data_speed.photograph(3)
    assert content == data_speed.photograph(3) != data_speed.photograph(11)
    assert shards.picture_size(content) == data_speed.SIZES[3] and len(content) > 50_000
