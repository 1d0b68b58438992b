"""bench.py: what it counts against torch's own counters, what it times by a clock of ours, and that it runs as typed.

How long anything takes is not tested.
"""

import itertools
import json
import types
from collections import Counter

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


def made(label: str, size: dict = TINY, shape: tuple = (8, 3, 16, 16), recompute: int = 0) -> bench.Step:
    torch.manual_seed(0)
    args = types.SimpleNamespace(recompute=recompute, compile=False)
    networks = bench.networks(size, CPU, FP32, args)
    adam = torch.optim.Adam(networks[0].parameters(), lr=1e-4)
    return bench.Step(KINDS[label], networks, adam, bench.made_up_batch(networks[0], shape, TEXT))


# --- What is counted ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", KINDS)
def test_a_step_makes_the_passes_that_its_objective_names(label):
    name, flags, aux = KINDS[label]
    objective = OBJECTIVES[name]
    assert made(label).taken_apart()[1] == objective.forwards(aux, guided=bool(flags))


def test_what_a_backward_pass_needs_is_counted_once_and_without_weights():
    weight = torch.nn.Linear(5, 7, bias=False)
    x = torch.randn(3, 5, requires_grad=True)  # so that the weight is kept too
    assert bench.kept_bytes(lambda: weight(x).sum(), weight) == x.nbytes
    assert bench.kept_bytes(lambda: (weight(x) + weight(x)).sum(), weight) == x.nbytes
    assert bench.kept_bytes(lambda: weight(x).square().sum(), weight) == x.nbytes + 3 * 7 * 4


def test_only_the_auxiliary_term_and_not_recomputing_keep_more():
    kept = {label: made(label).memory()["kept_mib"] for label in ("flow_matching", "self_e", "self_e, aux")}
    assert kept["self_e"] == pytest.approx(kept["flow_matching"], rel=0.02)
    assert 1.3 * kept["self_e"] < kept["self_e, aux"] < 1.6 * kept["self_e"]  # half of the batch once more
    assert made("self_e", recompute=3).memory()["kept_mib"] < 0.5 * kept["self_e"]


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


@pytest.mark.parametrize(
    "label, evaluations", [("flow_matching", 0), ("self_e", 2), ("self_e, aux", 2), ("imm", 1), ("tim", 2)]
)
def test_each_second_belongs_to_one_part(label, evaluations, monkeypatch):
    """By a clock that ticks whenever it is read: a part takes as many seconds as it has ends."""
    step = made(label)
    step()
    monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)
    forwards = 2 if label.endswith("aux") else 1
    parts = {"forward": forwards, "evaluations": evaluations, "targets and loss": forwards + evaluations + 1}
    parts |= {"backward": 1, "clipping": 1, "Adam": 1, "EMA": 1}
    assert step.taken_apart()[0] == Counter(parts)


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
