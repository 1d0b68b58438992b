"""What the paper leaves open, asked in 2-D: the questions, and the settings that answer them.

    python -m toy.any_step --study list           # the questions
    python -m toy.any_step --study s_rule         # train and measure what toy/results/s_rule.json lacks, print tables

A study is a table of settings. Each setting is (departures of the training from training.PAPER, choices of the sampler)
and is run for every layout and three seeds. toy/results/NAME.json keeps one record per (setting, layout, seed) with
commit, hardware and time; a study that was interrupted goes on where it stopped, and one that is complete only prints
its tables.
"""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

import torch

from engine import checkpoint, errors, machine
from toy.measures import BUDGETS, evaluate
from toy.mixture import LAYOUTS
from toy.training import Member, trained

SEEDS = (0, 1, 2)
PAPER = {}, {}  # nothing changed: "Self-E"
FLOW = dict(p_equal=1.0), dict(s_rule=1.0)  # flow matching has only learned s = t, so it is sampled there
CONTROL = dict(delta_scale=0.0), {}


class Study(NamedTuple):
    question: str
    settings: dict  # label -> (training, sampling)
    layouts: tuple = ("between", "far")


def peer(objective: str, p_equal: float, **changes) -> tuple[dict, dict]:
    """Another objective's own share of s = t and its own sampler."""
    return dict(objective=objective, p_equal=p_equal, **changes), dict(objective=objective)


def crossed(trainings: dict, choices: dict) -> dict:
    """Every training with every choice of the sampler."""
    pairs = itertools.product(trainings.items(), choices.items())
    return {f"{a}, {b}": (training, sampling | more) for (a, (training, sampling)), (b, more) in pairs}


# "between" alone is enough for questions about the classifier term: in "far" it has next to nothing to say.
BETWEEN = ("between",)

STUDIES = {
    "objectives": Study(
        "Which objective, at which number of steps? (Tab. 2)",
        {
            "flow matching": FLOW,
            "Self-E": PAPER,
            "Eq. 18 as target": (dict(target="tar"), {}),
            "Eq. 16 to the letter": (dict(target="sum"), {}),
            "control Delta = 0": CONTROL,
            "auxiliary throughout": (dict(aux_from=0.0), {}),
            "auxiliary late": (dict(aux_from=0.77), {}),
        },
        tuple(LAYOUTS),
    ),
    "peers": Study(
        "Self-E beside the other any-step objectives (peers/): which is nearest to the data, at which number of steps?",
        {
            "flow matching": FLOW,
            "Self-E": PAPER,
            "k = 0 throughout": (dict(aux_from=0.0, k=0.0), {}),
            "IMM": peer("imm", 1.0),
            "shortcut": peer("shortcut", 7 / 8),
            "MeanFlow": peer("meanflow", 0.75),
            "MeanFlow (power 0)": peer("meanflow", 0.75, loss_power=0.0),
            "improved MeanFlow (power 0)": peer("improved_meanflow", 0.5, loss_power=0.0),
            "TiM": peer("tim", 0.5),
            "TiM (power 0)": peer("tim", 0.5, loss_power=0.0),
        },
        tuple(LAYOUTS),
    ),
    "s_rule": Study(
        "How does s_k between t_(k+1) (0) and t_k (1) act at each budget? (S.3.1, Fig. S.3, S.4)",
        crossed(
            {"Self-E": PAPER, "auxiliary late": (dict(aux_from=0.77), {})},
            {f"s_rule {r:g}": dict(s_rule=r) for r in (0.0, 0.25, 0.5, 0.75, 1.0)},
        ),
    ),
    "eta": Study(
        "Which rule makes the step: eta = 0, 0.5, 1 (the paper) or re-noising (Eq. 8)?",
        crossed(
            {"flow matching": FLOW, "Self-E": PAPER},
            {"eta 0": dict(eta=0.0), "eta 0.5": dict(eta=0.5), "eta 1": {}, "renoise": dict(eta="renoise")},
        ),
    ),
    "guidance": Study(
        "What does energy-preserving guidance add at inference, and in which space? (Sec. 3.4)",
        crossed(
            {"flow matching": FLOW, "Self-E": PAPER},
            {f"w {w:g}": dict(guidance=w) if w > 1 else {} for w in (1.0, 1.5, 3.0, 5.0)}
            | {"w 3 in x0": dict(guidance=3.0, space="x0")},
        ),
        BETWEEN,
    ),
    "aux_start": Study(
        "When to switch the auxiliary term on? (S.1.2, Fig. 6; shares of the training, the paper's is 0.77)",
        {"never": PAPER} | {f"from {a:g}": (dict(aux_from=a), {}) for a in (0.77, 0.5, 0.25, 0.0)},
        BETWEEN,  # for "far" see objectives and k
    ),
    "k": Study(
        "How sensitive is the auxiliary stage to k, the share of the classifier term? (S.1.2; from half-way)",
        {f"k = {k:g}": (dict(aux_from=0.5, k=k), {}) for k in (1.0, 0.9, 0.5, 0.0)}
        | {"k = 0, Eq. 18": (dict(aux_from=0.5, k=0.0, target="tar"), {})},
    ),
    "lambda_scale": Study(
        "How sensitive is training to the scale of lambda? (S.5)",
        {f"lambda x {a:g}": (dict(lam_scale=a), {}) for a in (0.1, 0.3, 1.0, 3.0)},
        BETWEEN,
    ),
    "unconditional": Study(
        "Without conditions the classifier score vanishes. Is k = 0 enough? (S.5, future work 4)",
        {
            label: (dict(labels=False) | training, dict(labels=False) | sampling)
            for label, (training, sampling) in {
                "flow matching": FLOW,
                "Eq. 19 alone": (dict(null_target="renorm"), {}),
                "k = 0 throughout": (dict(aux_from=0.0, k=0.0), {}),
                "k = 0 from half-way": (dict(aux_from=0.5, k=0.0), {}),
                "k = 0 from half-way, Eq. 18": (dict(aux_from=0.5, k=0.0, target="tar"), {}),
            }.items()
        },
    ),
    "branches": Study(
        "Which network evaluates: moving average or online, in each branch? (S.2: conditional EMA, null online)",
        {
            f"conditional {a}, null {b}": (dict(conditional=a, unconditional=b), {})
            for a, b in itertools.product(("ema", "online"), ("online", "ema"))
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
            f"{name}, {share:g} wrong": (training | dict(wrong_labels=share), sampling | more)
            for name, (training, sampling), more in (
                ("flow matching", FLOW, {}),
                ("flow matching at w 2", FLOW, dict(guidance=2.0)),
                ("control Delta = 0", CONTROL, {}),
                ("Self-E", PAPER, {}),
                ("Self-E at w 2", PAPER, dict(guidance=2.0)),
            )
            for share in (0.0, 0.2, 0.4, 0.6)
        },
    ),
}


def run(name: str, out: Path, seeds: tuple, layouts: tuple, steps: int) -> dict:
    """Fill OUT/NAME.json, setting by setting, and return it."""
    study, path = STUDIES[name], out / f"{name}.json"
    results = {"records": [], "study": name, "question": study.question}
    if path.exists():
        results = checkpoint.read_json(path)
    made_by = machine.provenance(torch.device("cpu"))
    without_labels = all(not sampling.get("labels", True) for _, sampling in study.settings.values())
    floor = {"floor": (None, {"labels": False} if without_labels else {})}  # fresh data, as if generated
    settings = {
        label: {"training": training, "sampling": sampling, "steps": steps}
        for label, (training, sampling) in (floor | study.settings).items()
    }
    if any(settings.get(record["label"]) != record["setting"] for record in results["records"]):
        raise errors.UserError(f"{path} holds results of other settings: choose another --out")
    done = {(record["label"], record["layout"], record["seed"]) for record in results["records"]}
    members = [Member(layout, seed) for layout in layouts for seed in seeds]
    for (label, setting), member in itertools.product(settings.items(), members):
        if (label, *member) in done:
            continue
        start = time.perf_counter()
        net = None if setting["training"] is None else trained(member, steps, setting["training"])
        between = time.perf_counter()
        measured = evaluate(net, member, **setting["sampling"])
        seconds = {"train_s": round(between - start, 1), "measure_s": round(time.perf_counter() - between, 1)}
        record = {"label": label, **member._asdict(), "setting": setting, **made_by, **seconds}
        results["records"].append(record | {"results": measured})
        checkpoint.write_json(path, results)
        print(f"{name}: {label}, {member.layout}, seed {member.seed}: {seconds}", flush=True)
    return results


def cells(results: dict, layout: str, measure: str) -> dict[str, list]:
    """{setting: [budgets, seeds]} of what has been measured."""
    found = {}
    for record in results["records"]:
        if record["layout"] == layout:
            rows = found.setdefault(record["label"], [[] for _ in BUDGETS])
            for row, n in zip(rows, BUDGETS):
                row.append(record["results"][str(n)][measure])
    return found
