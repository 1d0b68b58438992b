"""The folder toy/: every line of the identity table, the commands as a student
runs them, and the measures it reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import errors
from toy import any_step, identities, measures, studies
from toy.mixture import LAYOUTS, Mixture
from toy.training import STEPS, Member, Net, assemble, train

ROOT = Path(__file__).resolve().parents[1]


def python(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a command as a user would, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("line", identities.CHECKS, ids=[line[-1].__name__ for line in identities.CHECKS])
def test_identity(line):
    equation, claim, bound, is_above, function = line
    number = function()
    assert number >= bound if is_above else number <= bound, f"{equation}: {claim}: {number:.2e} against {bound:.0e}"


def test_the_table_runs_from_any_folder(tmp_path):
    run = python(ROOT / "toy" / "identities.py", "--only", "Eq. 19", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3 of 3 lines hold" in run.stdout and "FAILS" not in run.stdout


def test_a_failing_line_fails_the_command():
    broken = (
        "import sys, losses; losses.lam = lambda t, s: t - s; from toy import identities; "
        "sys.argv = ['identities.py', '--only', 'Eq. 17']; sys.exit(identities.main())"
    )
    run = python("-c", broken)
    assert run.returncode == 1 and "FAILS" in run.stdout, run.stderr


def test_an_unknown_equation_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["identities.py", "--only", "Eq. 99"])
    assert identities.main() == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Data, measures, training and the commands
# ---------------------------------------------------------------------------------------------------------------------
def test_samples_of_the_mixture_have_its_moments():
    q = Mixture(**LAYOUTS["between"], dtype=torch.float64)
    x = q.sample(torch.full((40000,), 1), np.random.default_rng(0))
    mean = q.weights[1] @ q.means[1]
    second = (q.weights[1] * (q.means[1].square().sum(1) + 2 * q.std[1] ** 2)).sum()
    assert torch.allclose(x.mean(0), mean, atol=0.03) and abs(float(x.square().sum(1).mean() - second)) < 0.06


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture([[[0.0, 0.0], [1.0, 1.0]]], weights=[[0.5, 0.6]])


def test_energy_distance_of_gaussians_against_its_closed_form():
    # E|X - Y| for X - Y ~ N((d, 0), 2 v I) is the mean of a Rice law; here by quadrature over the plane, not by
    # sampling.
    g, d, v = np.random.default_rng(0), 1.3, 0.25
    x, y = (torch.from_numpy(g.standard_normal((4000, 2)) * v**0.5) for _ in range(2))
    y[:, 0] += d
    z, w = np.polynomial.hermite_e.hermegauss(60)
    w = np.outer(w, w) / w.sum() ** 2
    mean_norm = lambda d: (w * np.hypot(d + (2 * v) ** 0.5 * z[:, None], (2 * v) ** 0.5 * z)).sum()  # noqa: E731
    assert abs(measures.energy_distance(x, y) - (2 * mean_norm(d) - 2 * mean_norm(0.0))) < 0.02


def test_energy_distance_is_unbiased_at_equality():
    g = np.random.default_rng(1)
    values = [
        measures.energy_distance(*(torch.from_numpy(g.standard_normal((50, 2))) for _ in range(2))) for _ in range(400)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 400**0.5  # its biased form would be near 2 E|X-X'| / 50 = 0.07


def test_sliced_wasserstein_of_a_shift():
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((500, 2)))
    shift = torch.tensor(
        [3.0, 4.0], dtype=torch.float64
    )  # along direction u the quantiles move by shift.u; mean square |shift|^2 / 2
    x = x.float()
    assert abs(measures.sliced_wasserstein(x, x + shift.float()) - 5 / 2**0.5) < 1e-3


def test_measures_of_the_truth_itself_and_of_a_blend():
    truth = measures.Truth(Member("far", 0), 0)
    q = Member("far", 0).q
    g = np.random.default_rng(3)
    good = truth.measure(q.sample(torch.zeros(2000, dtype=torch.int64), g))
    blend = truth.measure((q.weights[0] @ q.means[0]).expand(2000, 2)
                          + 0.005 * torch.from_numpy(g.standard_normal((2000, 2))).float())
    assert abs(good["energy"]) < 0.01 and good["off_modes"] < 0.01 and good["mass_error"] < 0.05
    assert blend["energy"] > 0.2 and max(blend["mass"]) == 1.0 and blend["spread"] < 0.1


def test_members_of_an_ensemble_share_nothing():
    members = [Member("between", 0), Member("far", 1)]
    together = train(members, 12, aux_from=0.5)
    alone = [train([m], 12, aux_from=0.5) for m in members]
    for name, value in together.state_dict().items():
        for e, net in enumerate(alone):
            assert torch.allclose(value[e], net.state_dict()[name][0], atol=2e-5), name


def test_an_ensemble_is_sampled_member_by_member():
    members = [Member("between", 0), Member("far", 1)]
    net, c = train(members, 12), torch.arange(3).repeat(5)
    alone = [assemble([m], [net.weights_of(e)]) for e, m in enumerate(members)]
    for choices in (dict(), dict(guidance=3.0), dict(guidance=2.0, space="x0", eta=0.0)):
        together = measures.generate(net, members, c, 3, **choices)
        for one, m, x in zip(alone, members, together):
            assert torch.allclose(measures.generate(one, [m], c, 3, **choices)[0], x, atol=1e-4), choices


def test_training_repeats_itself_and_moves():
    first, again, other = (train([Member("far", seed)], 8).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["x"], other["x"])


def test_the_network_of_fake_prompts_is_not_that_of_real_ones():
    c = torch.tensor([0, 4, 3, 7])  # a condition, its fake prompt, null, its fake prompt
    rows = Net([0], 3).prompt.flatten(0, 1)[c]
    assert len(rows.unique(dim=0)) == 4


@pytest.mark.slow
def test_any_step_command_writes_its_figures(tmp_path, monkeypatch):
    three = ("flow matching", "Self-E", "auxiliary throughout")  # what the figure of trajectories shows
    monkeypatch.setattr(any_step, "OBJECTIVES", {label: any_step.OBJECTIVES[label] for label in three})
    monkeypatch.setattr(measures, "SAMPLES", 50)
    monkeypatch.setattr(measures, "REFERENCE", 200)
    monkeypatch.setattr(
        sys, "argv", ["any_step.py", *"--steps 3 --layout far --jobs 1 --out".split(), str(tmp_path / "o")]
    )
    any_step.main()
    made = {path.name for path in (tmp_path / "o").iterdir()}
    assert made == {"any_step.json", "samples_far.png", "trajectories.png", "distances.png", "fields.png"}
    record = json.loads((tmp_path / "o" / "any_step.json").read_text())
    assert {"command", "commit", "hardware", "seed", "seconds", "settings"} <= record.keys()
    assert set(record["results"]["far"]) == {"floor", *three}


def test_the_list_of_studies_from_any_folder(tmp_path):
    run = python(ROOT / "toy" / "any_step.py", "--study", "list", cwd=tmp_path)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(studies.STUDIES), run.stderr


@pytest.mark.parametrize(
    "bad", [["--steps", "0"], ["--study", "nothing"], ["--seed", "-1"], ["--out", "a_file"], ["--layout", "x"]]
)
def test_bad_arguments_are_one_line_and_exit_2(bad, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["any_step.py", *bad])
    with pytest.raises(SystemExit) as end:
        errors.run(any_step.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and len(said.strip().splitlines()) == 1 and bad[0] in said
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)  # runs/toy of this test
    for name in ("losses.py", "model.py", "engine/randomness.py", "toy/training.py", "toy/mixture.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(measures, "SAMPLES", 50)
    monkeypatch.setattr(measures, "REFERENCE", 200)
    study = studies.Study("?", {"a": ({}, dict(eta=0.0)), "b": ({}, dict(eta=1.0))}, ("far",))
    monkeypatch.setitem(studies.STUDIES, "test", study)
    trained = []
    monkeypatch.setattr(
        studies, "train", lambda members, steps, **changes: trained.append(members) or train(members, steps, **changes)
    )
    said = []
    studies.run("test", tmp_path, seeds=(0,), steps=2, say=said.append)
    assert len(said) == 3 and len(trained) == 1  # floor, a, b; the two share their network
    full = studies.run("test", tmp_path, seeds=(0, 1), steps=2, say=said.append)
    assert trained[1:] == [[Member("far", 1)]] and len(full["records"]) == 6
    studies.run("test", tmp_path, seeds=(0, 1), steps=2, say=said.append)
    assert len(said) == 6 and len(trained) == 2
    assert "N = 50" in studies.table(full)
    before = (tmp_path / "test.json").read_bytes()
    with pytest.raises(errors.UserError, match="other settings"):  # they would be averaged together
        studies.run("test", tmp_path, seeds=(0, 1), steps=3)
    assert (tmp_path / "test.json").read_bytes() == before


def test_kept_results_name_what_made_them():
    files = sorted((ROOT / "toy" / "results").glob("*.json"))
    assert files
    for path in files:
        kept = json.loads(path.read_text())
        assert kept["command"].startswith("python toy/"), path.name
        for record in kept["records"] if "study" in kept else [kept]:
            assert record["commit"] and record["hardware"] and record["torch"], path.name
            if "study" in kept and record["label"] != "floor":
                changes, sampling = studies.STUDIES[kept["study"]].settings[record["label"]]
                assert record["setting"] == {"training": changes, "sampling": sampling, "steps": STEPS}, path.name
