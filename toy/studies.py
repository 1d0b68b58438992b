"""What the paper leaves open, asked in 2-D: the questions, their settings, and the bookkeeping of the answers.

    python toy/any_step.py --study list           # the questions
    python toy/any_step.py --study s_rule         # train and measure what toy/results/s_rule.json lacks, print table

A study is a table of settings. Each setting is (departures of the training from training.PAPER, choices of the sampler)
and is run for every layout and three seeds. toy/results/NAME.json keeps one record per (setting, layout, seed) with
command, commit, hardware and time; a study that was interrupted goes on where it stopped, and one that is complete only
prints its table. Trained networks are kept in runs/toy, so that two studies never train the same network twice.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine import checkpoint, errors, machine
from toy.measures import BUDGETS, evaluate
from toy.mixture import LAYOUTS
from toy.training import PAPER, STEPS, Member, assemble, train

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
FLOW = dict(p_equal=1.0)  # flow matching has only learned s = t, so it is sampled there
AT_T = dict(s_rule=1.0)


class Study(NamedTuple):
    question: str
    settings: dict  # label -> (training, sampling)
    layouts: tuple = ("between", "far")


BETWEEN = (
    "between",
)  # enough for questions about the classifier term: in "far" it has next to nothing to say


def crossed(trained: dict, sampled: dict) -> dict:
    """Every training with every choice of the sampler."""
    return {
        f"{a}, {b}": (train, train_at | sample)
        for a, (train, train_at) in trained.items()
        for b, sample in sampled.items()
    }


STUDIES = {
    "objectives": Study(
        "Which objective, at which number of steps? (Tab. 2)",
        {
            "flow matching": (FLOW, AT_T),
            "Self-E": ({}, {}),
            "Eq. 18 as target": (dict(target="tar"), {}),
            "Eq. 16 to the letter": (dict(target="sum"), {}),
            "control Delta = 0": (dict(delta_scale=0.0), {}),
            "auxiliary throughout": (dict(aux_from=0.0), {}),
            "auxiliary late": (dict(aux_from=0.77), {}),
        },
        tuple(LAYOUTS),
    ),
    "peers": Study(
        "Self-E beside the other any-step objectives (peers/): which is nearest to the data, at which number of steps?",
        {
            "flow matching": (FLOW, AT_T),
            "Self-E": ({}, {}),
            "k = 0 throughout": (dict(aux_from=0.0, k=0.0), {}),
            **{
                label: (dict(objective=name, p_equal=p_equal) | more, dict(objective=name))
                for label, name, p_equal, more in (
                    ("IMM", "imm", 1.0, {}),
                    ("shortcut", "shortcut", 7 / 8, {}),
                    ("MeanFlow", "meanflow", 0.75, {}),
                    ("MeanFlow (power 0)", "meanflow", 0.75, dict(loss_power=0.0)),
                    ("improved MeanFlow (power 0)", "improved_meanflow", 0.5, dict(loss_power=0.0)),
                    ("TiM", "tim", 0.5, {}),
                    ("TiM (power 0)", "tim", 0.5, dict(loss_power=0.0)),
                )
            },
        },
        tuple(LAYOUTS),
    ),
    "s_rule": Study(
        "How does s_k between t_(k+1) (0) and t_k (1) act at each budget? (S.3.1, Fig. S.3, S.4)",
        crossed(
            {"Self-E": ({}, {}), "auxiliary late": (dict(aux_from=0.77), {})},
            {f"s_rule {r:g}": dict(s_rule=r) for r in (0.0, 0.25, 0.5, 0.75, 1.0)},
        ),
    ),
    "eta": Study(
        "Which rule makes the step: eta = 0, 0.5, 1 (the paper) or re-noising (Eq. 8)?",
        crossed(
            {"flow matching": (FLOW, AT_T), "Self-E": ({}, {})},
            {"eta 0": dict(eta=0.0), "eta 0.5": dict(eta=0.5), "eta 1": {}, "renoise": dict(eta="renoise")},
        ),
    ),
    "guidance": Study(
        "What does energy-preserving guidance add at inference, and in which space? (Sec. 3.4)",
        crossed(
            {"flow matching": (FLOW, AT_T), "Self-E": ({}, {})},
            {
                "w 1": {},
                "w 1.5": dict(guidance=1.5),
                "w 3": dict(guidance=3.0),
                "w 5": dict(guidance=5.0),
                "w 3 in x0": dict(guidance=3.0, space="x0"),
            },
        ),
        BETWEEN,
    ),
    "aux_start": Study(
        "When to switch the auxiliary term on? (S.1.2, Fig. 6; shares of the training, the paper's is 0.77)",
        {"never": ({}, {})} | {f"from {a:g}": (dict(aux_from=a), {}) for a in (0.77, 0.5, 0.25, 0.0)},
        BETWEEN,  # for "far" see objectives and k
    ),
    "k": Study(
        "How sensitive is the auxiliary stage to k, the share of the classifier term? (S.1.2; from half-way)",
        {f"k = {k:g}": (dict(aux_from=0.5, k=k), {}) for k in (1.0, 0.9, 0.5, 0.0)}
        | {"k = 0, Eq. 18": (dict(aux_from=0.5, k=0.0, target="tar"), {})},
    ),
    "lambda_s": Study(
        "Lambda decoupled from s: what if the weight saw another second time? (S.3.1)",
        {f"lambda sees {name}": (dict(lam_s=name), {}) for name in ("s", "0", "s/2", "(s+t)/2")},
        BETWEEN,
    ),
    "lambda_scale": Study(
        "How sensitive is training to the scale of lambda? (S.5)",
        {f"lambda x {a:g}": (dict(lam_scale=a), {}) for a in (0.1, 0.3, 1.0, 3.0)},
        BETWEEN,
    ),
    "unconditional": Study(
        "Without conditions the classifier score vanishes. Is k = 0 enough? (S.5, future work 4)",
        {
            name: (dict(labels=False) | train, dict(labels=False) | sample)
            for name, (train, sample) in {
                "flow matching": (FLOW, AT_T),
                "Eq. 19 alone": (dict(null_target="renorm"), {}),
                "k = 0 throughout": (dict(aux_from=0.0, k=0.0), {}),
                "k = 0 from half-way": (dict(aux_from=0.5, k=0.0), {}),
                "k = 0 from half-way, Eq. 18": (dict(aux_from=0.5, k=0.0, target="tar"), {}),
            }.items()
        },
    ),
    "p_equal": Study(
        "How many samples should have s = t? (S.2, the paper's share is 0.5)",
        {f"p = {p:g}": (dict(p_equal=p), {}) for p in (0.0, 0.25, 0.5, 0.75)},
        BETWEEN,
    ),
    "branches": Study(
        "Which network evaluates: moving average or online, in each branch? (S.2: conditional EMA, null online)",
        {
            f"conditional {a}, null {b}": (dict(conditional=a, unconditional=b), {})
            for a in ("ema", "online")
            for b in ("online", "ema")
        },
        BETWEEN,
    ),
    "tau": Study(
        "How fast should s be let away from t? (s.13; share of the training over which tau rises)",
        {f"over {a:g}": (dict(tau_over=a), {}) for a in (0.0, 0.42, 1.0)},
        BETWEEN,
    ),
    "wrong_labels": Study(
        "What if the condition is wrong now and then? (distances are to the clean q(x0 | c))",
        {
            f"{name}, {share:g} wrong": (train | dict(wrong_labels=share), sample)
            for name, (train, sample) in {
                "flow matching": (FLOW, AT_T),
                "flow matching at w 2": (FLOW, AT_T | dict(guidance=2.0)),
                "control Delta = 0": (dict(delta_scale=0.0), {}),
                "Self-E": ({}, {}),
                "Self-E at w 2": ({}, dict(guidance=2.0)),
            }.items()
            for share in (0.0, 0.2, 0.4, 0.6)
        },
    ),
    "null": Study(
        "What should a null prompt learn at s < t: the data, or Eq. 19 with Delta = 0?",
        crossed(
            {"data": ({}, {}), "Eq. 19": (dict(null_target="renorm"), {})},
            {"w 1": {}, "w 3": dict(guidance=3.0)},
        ),
        BETWEEN,
    ),
}


# ============================================================================================================
# Bookkeeping
# ============================================================================================================
def weights_file(member: Member, steps: int, changes: dict) -> Path:
    """Where a trained member is kept: named by all that made it, the text of the code that trains included."""
    peers = ["baselines.py", "peers/meanflow.py", "peers/shortcut.py", "peers/tim.py"]
    self_e = (PAPER | changes)["objective"] == "self_e"
    code = [
        (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "losses.py",
            "model.py",
            "engine/randomness.py",
            "toy/training.py",
            "toy/mixture.py",
            *([] if self_e else peers),
        )
    ]
    recipe = json.dumps([member, steps, PAPER | changes, code], sort_keys=True)
    return ROOT / "runs" / "toy" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"


def trained(members: list[Member], steps: int, changes: dict):
    """The ensemble of `members`, from runs/toy where it is known; the others are trained together and kept."""
    files = {m: weights_file(m, steps, changes) for m in members}
    missing = [m for m in members if not files[m].exists()]
    if missing:
        net = train(missing, steps, **changes)
        files[members[0]].parent.mkdir(parents=True, exist_ok=True)
        for e, m in enumerate(missing):
            partial = files[m].with_suffix(".part")
            torch.save(net.weights_of(e), partial)
            partial.replace(files[m])
    return assemble(members, [torch.load(files[m], weights_only=True) for m in members])


def records_of(path: Path) -> dict:
    """What a study has measured so far. Raises UserError for another program's file."""
    kept, names = checkpoint.read_json(path), {"label", "layout", "seed", "setting", "results"}
    records = kept.get("records") if isinstance(kept, dict) else None
    if not isinstance(records, list) or not all(isinstance(r, dict) and names <= set(r) for r in records):
        raise errors.UserError(f"{path} holds no records of a study: choose another --out")
    return kept


def run(name: str, out: Path, seeds=SEEDS, steps: int = STEPS, say=print) -> dict:
    """Fill toy/results/NAME.json, setting by setting, and return it."""
    study, path = STUDIES[name], out / f"{name}.json"
    made_by = machine.provenance(torch.device("cpu"))
    kept = records_of(path) if path.exists() else {"records": []}
    kept |= {"study": name, "question": study.question, "command": f"python toy/any_step.py --study {name}"}
    settings = {
        label: {"training": changes, "sampling": sampling, "steps": steps}
        for label, (changes, sampling) in rows_of(study)
    }
    others = [r for r in kept["records"] if settings.get(r["label"]) != r["setting"]]
    if others:
        raise errors.UserError(
            f"{path} holds results of other settings ({others[0]['label']}, "
            f"{others[0]['setting']['steps']} steps): choose another --out"
        )
    for label, setting in settings.items():
        changes, sampling = setting["training"], setting["sampling"]
        members = [Member(layout, seed) for layout in study.layouts for seed in seeds]
        done = {(r["label"], r["layout"], r["seed"]) for r in kept["records"]}
        todo = [m for m in members if (label, m.layout, m.seed) not in done]
        if not todo:
            continue
        start = time.perf_counter()
        net = None if changes is None else trained(todo, steps, changes)
        between = time.perf_counter()
        results = evaluate(net, todo, **sampling)
        times = {"train_s": round(between - start, 1), "measure_s": round(time.perf_counter() - between, 1)}
        for m, result in zip(todo, results):
            kept["records"].append(
                {
                    "label": label,
                    "layout": m.layout,
                    "seed": m.seed,
                    "setting": setting,
                    **made_by,
                    "together": len(todo),
                    **times,
                    "results": result,
                }
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, kept)
        say(
            f"{name}: {label}: {times['train_s']} s training, {times['measure_s']} s measuring ({len(todo)} networks)"
        )
    return kept


def rows_of(study: Study) -> list:
    """The settings, after the floor: fresh data measured as if it were generated."""
    floor = {"labels": False} if all(not s.get("labels", True) for _, s in study.settings.values()) else {}
    return [("floor", (None, floor)), *study.settings.items()]


def table(kept: dict, measure: str = "energy") -> str:
    """Mean and standard deviation over the seeds, one line per setting, one block per layout."""
    lines = [kept["question"]]
    labels = list(dict.fromkeys(r["label"] for r in kept["records"]))
    for layout in dict.fromkeys(r["layout"] for r in kept["records"]):
        lines.append(f"\n{layout + ': ' + measure:34s}" + "".join(f"{f'N = {n}':>16s}" for n in BUDGETS))
        for label in labels:
            rows = [r["results"] for r in kept["records"] if (r["label"], r["layout"]) == (label, layout)]
            cells = [[row[str(n)][measure] for row in rows] for n in BUDGETS]
            lines.append(
                f"{label:34s}"
                + "".join(f"{np.mean(c):9.4f} ±{np.std(c, ddof=1) if len(c) > 1 else 0:6.4f}" for c in cells)
            )
    return "\n".join(lines)
