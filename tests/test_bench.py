"""bench.py: what it counts against torch's own counters, what it times by a clock of ours, and that it runs as typed.

How long anything takes is not tested.
"""

import json
import types

import programs
import pytest
import torch
from programs import run

import bench
import model
from engine import price
from objectives import OBJECTIVES

TINY = programs.TINY | dict(single=2, txt_dim=12, vec_dim=10)
CPU, FP32 = torch.device("cpu"), torch.float32
TEXT = 14
KINDS = bench.kinds(list(OBJECTIVES))


def made(label: str) -> bench.Step:
    torch.manual_seed(0)
    args = types.SimpleNamespace(recompute=0, compile=False)
    networks = bench.networks(TINY, CPU, FP32, args)
    adam = torch.optim.Adam(networks[0].parameters(), lr=1e-4)
    return bench.Step(KINDS[label], networks, adam, bench.made_up_batch(networks[0], (8, 3, 16, 16), TEXT))


# --- What is counted ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", KINDS)
def test_a_step_makes_the_passes_that_are_reported(label):
    step, samples = made(label), []

    def passed(network, inputs, out):
        samples.append(len(out) * (3 if out.requires_grad else 1))

    for network in (step.network, step.ema):
        network.register_forward_hook(passed)
    step()
    assert step.passes == sum(samples) / 8


# --- What is timed ------------------------------------------------------------------------------------------
def test_turns_are_taken_and_the_warm_up_is_not_counted(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        order.append(name)
        clock[0] += seconds * (100 if len(order) <= 4 else 1)

    works = {"a": lambda: work("a", 2.0), "b": lambda: work("b", 3.0)}
    assert bench.in_turns(works, 3) == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert order == ["a", "b"] * 5
    assert bench.ratio([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == 2.0  # of each round, not of the medians


# --- The command --------------------------------------------------------------------------------------------
FLAGS = ["--device", "cpu", "--precision", "fp32"]


def test_as_a_user_runs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    out = tmp_path / "bench.json"
    words = ["--batch", 4, "--repeats", 2, "--side", 8, "--objectives", "self_e", "--out", out]
    run(monkeypatch, bench, *FLAGS, *words)
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {"command", "commit", "hardware", "date"} <= set(report) and "self_e, aux" in printed
    assert (report["image_tokens"], report["text_tokens"], report["precision"]) == (4, 14, "float32")
    assert list(report["rows"]) == ["flow_matching", "self_e", "self_e, aux"]
    flops = 4 * price.forward_flops(TINY, 4, 14)
    for row in report["rows"].values():
        rate = row["passes"] * flops / row["seconds"]
        assert row["mfu"] == pytest.approx(rate / (1e12 * report["peak_tflops"]))
        assert row["pictures_per_s"] == pytest.approx(4 / row["seconds"])
    assert report["rows"]["flow_matching"]["ratio"] == 1
