"""The folder toy/: every line of the identity table, the commands as a student runs them, and what they report."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import run

import losses
from engine import errors
from toy import any_step, ideal, identities, measures, pictures, studies, training
from toy.mixture import LAYOUTS, Mixture
from toy.training import STEPS, Member, batches, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("line", identities.CHECKS, ids=lambda line: line.function.__name__)
def test_identity(line):
    number = line.function()
    assert line.holds(number), f"{line.equation}: {line.claim}: {number:.2e} against {line.bound:.0e}"


def test_a_failing_line_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(losses, "lam", lambda t, s: t - s)
    monkeypatch.setattr(sys, "argv", ["identities.py", "--only", "Eq. 17"])
    assert identities.main() == 1
    printed = capsys.readouterr().out
    assert "FAILS" in printed and "0 of 2 lines hold" in printed


def test_samples_of_the_mixture_have_its_moments():
    q = Mixture(**LAYOUTS["between"], dtype=torch.float64)
    x = q.sample(torch.full((40000,), 1), np.random.default_rng(0))
    mean = q.weights[1] @ q.means[1]
    second = (q.weights[1] * (q.means[1].square().sum(1) + 2 * q.std[1] ** 2)).sum()
    assert torch.allclose(x.mean(0), mean, atol=0.03) and abs(float(x.square().sum(1).mean() - second)) < 0.06


def test_energy_distance_of_gaussians_against_its_closed_form():
    # E|X - Y| for X - Y ~ N((d, 0), 2 v I) is the mean of a Rice variable; here by quadrature over the plane, not by
    # sampling.
    g, d, v = np.random.default_rng(0), 1.3, 0.25
    x, y = (torch.from_numpy(g.standard_normal((4000, 2)) * v**0.5) for _ in range(2))
    y[:, 0] += d
    z, w = np.polynomial.hermite_e.hermegauss(60)
    w = np.outer(w, w) / w.sum() ** 2
    mean_norm = lambda d: (w * np.hypot(d + (2 * v) ** 0.5 * z[:, None], (2 * v) ** 0.5 * z)).sum()  # noqa: E731
    assert abs(measures.energy_distance(x, y) - (2 * mean_norm(d) - 2 * mean_norm(0.0))) < 0.02


def test_measures_of_the_truth_itself_and_of_a_blend():
    member, g = Member("far", 0), np.random.default_rng(3)
    truth, q = measures.Truth(member, 0), member.q
    good = truth.measure(q.sample(torch.zeros(2000, dtype=torch.int64), g))
    blur = 0.005 * torch.from_numpy(g.standard_normal((2000, 2))).float()
    blend = truth.measure(q.weights[0] @ q.means[0] + blur)
    assert abs(good["energy"]) < 0.01 and good["off_modes"] < 0.01 and good["mass_error"] < 0.05
    assert blend["energy"] > 0.2 and blend["off_modes"] == 1.0
    assert min(abs(blend["mass_error"] - 1 + q.weights[0])) < 1e-6  # all of it is nearest to one mode


def test_training_repeats_itself_and_moves():
    first, again, other = (train(Member("far", seed), 8).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["x"], other["x"])


def test_each_fake_prompt_has_a_row_of_its_own(monkeypatch):
    seen, step_of = [], training.step_of

    def watched(*networks):
        step = step_of(*networks)
        return lambda *a: seen.append(a[1:4]) or step(*a)

    monkeypatch.setattr(training, "step_of", watched)
    train(Member("between", 0), 2, aux_from=0.0)  # three conditions; a fourth prompt is the null prompt
    rows = {(c, fake) for (c,), _, (fake,) in seen for c, fake in zip(c.tolist(), fake.tolist())}
    assert [c for c, _ in sorted(rows)] == [0, 1, 2, 3]
    assert len({fake for _, fake in rows} - {0, 1, 2, 3}) == 4


@pytest.fixture
def command(tmp_path, monkeypatch):
    """any_step on little, in a folder of its own, and the networks that it has trained."""
    monkeypatch.setattr(measures, "SAMPLES", 50)
    monkeypatch.setattr(measures, "REFERENCE", 200)
    monkeypatch.setattr(training, "TRAINED", {})
    counted = []
    count = lambda member, *a, **k: counted.append(member) or train(member, *a, **k)  # noqa: E731
    monkeypatch.setattr(training, "train", count)

    def study(name: str, *flags: str) -> dict:
        run(monkeypatch, any_step, "--study", name, "--layout", "between", "--out", tmp_path, *flags)
        return json.loads((tmp_path / f"{name}.json").read_text())

    return study, counted


def test_a_study_goes_on_where_it_stopped(command):
    study, trained = command
    first = study("eta", "--steps", "2", "--seed", "0")
    assert len(first["records"]) == 9 and len(trained) == 2  # the floor; two networks, sampled in four ways
    assert {"commit", "hardware", "torch", "setting", "train_s"} <= first["records"][0].keys()
    second = study("eta", "--steps", "2", "--seed", "1")
    assert second["records"][:9] == first["records"] and len(second["records"]) == 18
    assert trained[2:] == [Member("between", 1)] * 2
    assert study("eta", "--steps", "2", "--seed", "1") == second and len(trained) == 4
    with pytest.raises(errors.UserError, match="other settings"):  # they would be averaged together
        study("eta", "--steps", "3")
    assert study("eta", "--steps", "2", "--seed", "1") == second


@pytest.mark.slow
def test_the_comparison_draws_its_figures(command, tmp_path):
    study, trained = command
    assert len(study("objectives", "--steps", "2", "--seed", "0")["records"]) == 8 and len(trained) == 7
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"objectives.json", "objectives_between.png", "fields.png"}


def test_kept_results_name_what_made_them_and_are_what_the_programs_would_write():
    files = sorted((ROOT / "toy" / "results").glob("*.json"))
    assert files
    for path in files:
        results = json.loads(path.read_text())
        assert results.get("command", "python -m toy").startswith(("python toy/", "python -m toy")), path.name
        for record in results["records"] if "study" in results else [results]:
            assert record["commit"] and record["hardware"] and record["torch"], path.name
        if "study" not in results:
            continue
        study = studies.STUDIES[results["study"]]
        assert results["question"] == study.question
        for record in results["records"]:
            if record["label"] != "floor":
                changes, sampling = study.settings[record["label"]]
                assert record["setting"] == {"training": changes, "sampling": sampling, "steps": STEPS}


def test_wrong_labels_are_as_many_as_asked_for_and_change_nothing_else():
    """Of three equally likely conditions a swapped label is another one in two cases of three."""
    member = Member("between", 0)
    clean, wrong = (list(batches(member, 100, True, share)) for share in (0.0, 0.6))
    for column in (0, 2, 3, 4, 5, 6):  # all but the labels
        assert all(torch.equal(a[column], b[column]) for a, b in zip(clean, wrong))
    before, after = (torch.cat([batch[1] for batch in part]) for part in (clean, wrong))
    shown = before < member.q.C  # the others are null prompts, in both
    assert torch.equal(shown, after < member.q.C)
    changed = (before != after)[shown].double().mean()
    assert abs(changed - 0.6 * 2 / 3) < 5 * (0.24 / shown.sum()) ** 0.5


@pytest.fixture(scope="module")
def small_world():
    """600 pictures for five prompts, 30% of the captions wrong."""
    return pictures.Shapes("shapes", "single_object", 0.3)


def test_deltas_budget_is_twice_the_information_of_the_captions(small_world):
    """I-MMSE: an integral over noise levels against a sum over prompts."""
    found = pictures.budget(small_world, samples=200)
    # The probability of a picture's prompt, and of each of the four others
    right, wrong = 0.7 + 0.3 / 5, 0.3 / 5
    expected = math.log(5) + right * math.log(right) + 4 * wrong * math.log(wrong)
    assert found["information"] == pytest.approx(expected, rel=1e-5)
    assert found["delta_budget"] == pytest.approx(2 * expected, rel=0.08) and 0.5 < found["half_at"] < 1


def test_perfect_answers_of_flow_matching_are_the_posterior_mean_and_null_prompts_keep_it(small_world):
    world = small_world
    c, t = torch.tensor([1, world.C]), torch.full((2,), 0.8)
    x_t = torch.randn(2, world.x.shape[1], generator=torch.Generator().manual_seed(1))
    mean = world.posterior_mean(x_t, 0.8, c)
    for label, s in (("flow matching", 0.4), ("classifier only", 0.4), ("k = 0.9", 0.8)):
        V = pictures.perfect(world, pictures.OBJECTIVES[label], 3, np.random.default_rng(0))
        x0_hat = x_t - 0.8 * V(x_t, t, torch.full((2,), s), c)
        assert torch.allclose(x0_hat[1], mean[1], atol=1e-4)  # the null prompt learns the data
        changed = not torch.allclose(x0_hat[0], mean[0], atol=1e-4)
        assert changed == (label == "classifier only")  # at s = t there is nothing to learn


def test_following_with_nothing_to_say_goes_to_the_norm_of_the_data():
    """Delta = 0 at t = 1: the answer keeps its direction and takes the norm of x0 (Eq. 19), whatever the start."""
    start, ones = torch.tensor([[0.6, 0.0]]), torch.ones(1)
    goal = ideal.GOALS["Eq. 19, Delta = 0"]
    data, noise = (lambda: torch.tensor([[3.0, 4.0]])), (lambda: torch.zeros(1, 2))
    end = ideal.follow(start, ones, 0.5 * ones, goal, 400, data, noise, lambda x_s, x0_hat: (x_s, x_s, x_s))
    assert torch.allclose(end, torch.tensor([[5.0, 0.0]]), atol=1e-3)


@pytest.mark.slow
def test_the_map_of_pictures_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A score for each tag."""
    tags, path = ("single_object", "two_object"), tmp_path / "pictures.json"
    small = pictures.Map(16, {"two kinds": tags}, (0.0, 0.3), pictures=50, prompts=3, judged=6, by_tag=True)
    monkeypatch.setitem(pictures.MAPS, "shapes", small)
    for name, value in {"FEWEST": 8, "ROUNDS": 2, "STEPS": (1, 2), "SEEDS": (0,)}.items():
        monkeypatch.setattr(pictures, name, value)
    run(monkeypatch, pictures, "--out", tmp_path)
    once = json.loads(path.read_text())
    assert {"command", "commit", "hardware", "seconds"} <= set(once) and len(once["records"]) == 2 * 6 * 2 * 2
    assert {record["world"] for record in once["records"]} == set(tags)
    path.write_text(json.dumps(once | {"records": once["records"][:28]}))  # of twelve objectives seven
    monkeypatch.setitem(pictures.MAPS, "shapes", small._replace(judged=12))
    with pytest.raises(errors.UserError, match="other settings"):
        run(monkeypatch, pictures, "--out", tmp_path)
    monkeypatch.setitem(pictures.MAPS, "shapes", small)
    run(monkeypatch, pictures, "--out", tmp_path)
    again = json.loads(path.read_text())
    assert again["records"] == once["records"] and again["worlds"] == once["worlds"]
