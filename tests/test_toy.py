"""The folder toy/: every line of the identity table, the commands as a student
runs them, and the measures it reports."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import errors
from toy import any_step, ideal, identities, measures, pictures, studies
from toy.mixture import LAYOUTS, Mixture
from toy.training import STEPS, Member, Net, assemble, batches, train

ROOT = Path(__file__).resolve().parents[1]


def python(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a command as a user would, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("line", identities.CHECKS, ids=[line[-1].__name__ for line in identities.CHECKS])
def test_identity(line):
    equation, claim, bound, is_above, function = line
    number = function()
    assert number >= bound if is_above else number <= bound, (
        f"{equation}: {claim}: {number:.2e} against {bound:.0e}"
    )


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


def test_an_unknown_equation_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["identities.py", "--only", "Eq. 99"])
    with pytest.raises(errors.UserError, match="Eq. 99"):
        identities.main()


# ------------------------------------------------------------------------------------------------------------
# Data, measures, training and the commands
# ------------------------------------------------------------------------------------------------------------
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
    # E|X - Y| for X - Y ~ N((d, 0), 2 v I) is the mean of a Rice variable; here by quadrature over the plane, not by
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
        measures.energy_distance(*(torch.from_numpy(g.standard_normal((50, 2))) for _ in range(2)))
        for _ in range(400)
    ]
    assert (
        abs(np.mean(values)) < 4 * np.std(values) / 400**0.5
    )  # its biased form would be near 2 E|X-X'| / 50 = 0.07


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
    blend = truth.measure(
        (q.weights[0] @ q.means[0]).expand(2000, 2)
        + 0.005 * torch.from_numpy(g.standard_normal((2000, 2))).float()
    )
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
    "bad",
    [["--steps", "0"], ["--study", "nothing"], ["--seed", "-1"], ["--out", "a_file"], ["--layout", "x"]],
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
        studies,
        "train",
        lambda members, steps, **changes: trained.append(members) or train(members, steps, **changes),
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
                assert record["setting"] == {"training": changes, "sampling": sampling, "steps": STEPS}, (
                    path.name
                )


# ------------------------------------------------------------------------------------------------------------
# Wrong labels, and the objective on pictures
# ------------------------------------------------------------------------------------------------------------
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
    return pictures.World("single_object", 0.3, 200, 2.0)


def test_the_exact_posterior_mean_of_pictures_is_bayes_rule(small_world):
    """Against densities written out in float64, picture by picture."""
    world, t = small_world, 0.6
    c = torch.tensor([0, 3, world.C])
    x_t = (1 - t) * world.x[[5, 350, 120]] + t * torch.randn(
        3, world.x.shape[1], generator=torch.Generator().manual_seed(0)
    )
    found = world.mean(x_t, t, c)
    N, each = len(world.x), world.each
    for row in range(3):
        log_q = torch.stack([-((x_t[row] - (1 - t) * x).double() ** 2).sum() / (2 * t**2) for x in world.x])
        prior = torch.full((N,), 0.3 / N if row < 2 else 1 / N, dtype=torch.float64)
        if row < 2:
            prior[int(c[row]) * each : (int(c[row]) + 1) * each] += 0.7 / each
        weights = (log_q + prior.log()).softmax(0)
        assert torch.allclose(found[row].double(), weights @ world.x.double(), atol=2e-3)
    assert torch.equal(world.mean(x_t, 0.0, c), x_t) and world.each >= 100


def test_deltas_budget_is_twice_the_information_of_the_captions(small_world):
    """I-MMSE: an integral over noise levels against a sum over prompts."""
    integral, half = pictures.budget(small_world, 0, samples=400)
    assert integral == pytest.approx(2 * small_world.information(), rel=0.08)
    assert 0.5 < half < 1
    told = 0.7 + 0.3 / 5, 0.3 / 5  # of the own prompt, and of each of the four others
    assert small_world.information() == pytest.approx(
        math.log(5) + told[0] * math.log(told[0]) + 4 * told[1] * math.log(told[1])
    )


def test_perfect_answers_of_flow_matching_are_the_posterior_mean_and_null_prompts_keep_it(small_world):
    world = small_world
    c, t = torch.tensor([1, world.C]), torch.full((2,), 0.8)
    x_t = torch.randn(2, world.x.shape[1], generator=torch.Generator().manual_seed(1))
    mean = world.mean(x_t, 0.8, c)
    for goal, s in (
        (None, 0.4),
        (pictures.OBJECTIVES["classifier only"], 0.4),
        (pictures.OBJECTIVES["k = 0.9"], 0.8),
    ):
        V = pictures.Perfect(world, goal, 3, np.random.default_rng(0))(x_t, t, torch.full((2,), s), c)
        x0_hat = x_t - 0.8 * V
        assert torch.allclose(x0_hat[1], mean[1], atol=1e-4)  # the null prompt learns the data
        assert torch.allclose(x0_hat[0], mean[0], atol=1e-4) == (
            goal is None or s == 0.8
        )  # nothing to learn at s = t


def test_following_with_nothing_to_say_goes_to_the_norm_of_the_data():
    """Delta = 0 at t = 1: the answer keeps its direction and takes the norm of x0 (Eq. 19), whatever the start."""

    class Mute:
        def data(self):
            return torch.tensor([[3.0, 4.0]])

        def noise(self):
            return torch.zeros(1, 2)

        def evaluate(self, x_s, x0_hat):
            return x_s, x_s, x_s

    start, ones = torch.tensor([[0.6, 0.0]]), torch.ones(1)
    end = ideal.follow(start, ones, 0.5 * ones, ideal.GOALS["Eq. 19, Delta = 0"], 400, Mute())
    assert torch.allclose(end, torch.tensor([[5.0, 0.0]]), atol=1e-3)


@pytest.mark.slow
def test_the_map_of_pictures_as_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "QUICK", pictures.Size((0.3,), 500, 10, 2, (1, 2), (0,)))
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    pictures.main()
    kept = json.loads((tmp_path / "pictures.json").read_text())
    assert {"command", "commit", "hardware", "seconds"} <= set(kept) and len(kept["records"]) == 3 * 6 * 2
    assert len(list(tmp_path.glob("*.png"))) == 4 and not [
        path for path in tmp_path.iterdir() if path.is_dir()
    ]

    measure, done = pictures.measure, []  # stopped in the second world, the same command makes the same map

    def stop_at_the_eighth(*arguments):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(pictures, "measure", stop_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        pictures.main()
    assert not list((tmp_path / "stopped").glob("*.*"))
    monkeypatch.setattr(pictures, "measure", lambda *arguments: done.append(arguments) or measure(*arguments))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--scale", "1"])
    with pytest.raises(errors.UserError, match="other settings"):
        pictures.main()
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    pictures.main()
    again = json.loads((tmp_path / "stopped/pictures.json").read_text())
    assert again["records"] == kept["records"] and len(done) == 3 * 6
    for sheet in tmp_path.glob("*.png"):
        assert (tmp_path / "stopped" / sheet.name).read_bytes() == sheet.read_bytes()
