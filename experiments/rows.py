"""What the table compares: its rows, the differences that decide claims, the budget, the settings searched for each."""

from typing import NamedTuple

import numpy as np

import recipe
from objectives import OBJECTIVES


class Row(NamedTuple):
    """A way to train, and to sample. Rows that train alike share their runs."""

    title: str
    flags: str  # of train.py, beside those of the budget
    paper: tuple[float, ...] | None = None  # GenEval at 2, 4, 8 and 50 steps (the paper's Table 2)
    eta: float | str = 1.0  # the sampler's, beside 0
    iterations: float = 1.0  # share of the budget's


GUIDED = " --train-guidance 3"  # flow matching's best at most step counts in the first table; one scale for all peers
# A finite difference drowns in the budget's bf16.
MEANFLOW = "--derivative forward --objective meanflow"
IMPROVED = "--derivative forward --objective improved_meanflow"
TIM = "--precision fp32 --objective tim"
SELF_E = "--aux-from 1"  # the classifier score alone, "Ours" of the paper's Table 2
ROWS = {
    "flow_matching": Row("flow matching", "--objective flow_matching", (0.2523, 0.6075, 0.7155, 0.7311)),
    "control": Row("control: Eq. 19 with Delta = 0", f"{SELF_E} --delta-scale 0"),
    "self_e": Row("Self-E", SELF_E, (0.6097, 0.7121, 0.7490, 0.7543)),
    # At s = t flow matching at half the batch sees as many pictures as Self-E, and Self-E at twice the batch as many as
    # flow matching.
    "flow_matching_16": Row("flow matching at half the batch", "--objective flow_matching --batch-size 16"),
    # Equally few pictures without the noisier gradients of small batches, in half of the iterations.
    "flow_matching_half": Row(
        "flow matching, half the iterations", "--objective flow_matching", iterations=0.5
    ),
    "flow_matching_64": Row("flow matching at twice the batch", "--objective flow_matching --batch-size 64"),
    "control_64": Row("control at twice the batch", f"{SELF_E} --delta-scale 0 --batch-size 64"),
    "self_e_64": Row("Self-E at twice the batch", f"{SELF_E} --batch-size 64"),
    # The paper's ablations (Table 2).
    "eq16": Row(
        "w/o target norm.: Eq. 16 to the letter", f"{SELF_E} --target sum", (0.5555, 0.6156, 0.6521, 0.7018)
    ),
    "eq18": Row("w/o target norm.: Eq. 18 as target", f"{SELF_E} --target tar"),
    "aux_throughout": Row("w/ aux. term throughout", "--aux-from 0", (0.3307, 0.4304, 0.5153, 0.6166)),
    "aux_late": Row("w/ aux. term late", f"--aux-from {recipe.AUX_FROM:.4f}"),
    "imm": Row("IMM", "--objective imm", (0.2617, 0.5994, 0.7112, 0.7472)),
    "imm_coarse": Row("IMM in fewer, coarser steps (k = 3)", "--objective imm --imm-k 3"),
    # Where the paper is silent, or its co-author's code differs.
    "self_e_ema": Row("Self-E, both branches by the EMA", f"{SELF_E} --null-branch ema"),
    "literal_null": Row("Self-E, dropped prompts no exception", f"{SELF_E} --objective self_e_literal_null"),
    "public_eta": Row("Self-E, eta as in public code", SELF_E, eta="public"),
    # Remedies for what the half with s < t lacks: data at large t.
    "fed_share": Row("Self-E, s = t for three quarters", f"{SELF_E} --objective self_e_mostly_equal"),
    "fed_scale": Row("Self-E, a quarter of lambda", f"{SELF_E} --objective self_e_quarter_lambda"),
    "fed_middle": Row("Self-E, lambda from (s + t) / 2", f"{SELF_E} --objective self_e_middle_lambda"),
    # The gallery: the other any-step objectives (peers/), without and with guidance in their targets.
    "matching": Row("distribution matching (Self-E, k = 0)", "--aux-from 0 --k 0"),
    "shortcut": Row("shortcut models", "--objective shortcut"),
    "shortcut_guided": Row("shortcut models, guided", "--objective shortcut" + GUIDED),
    "meanflow": Row("MeanFlow", MEANFLOW),
    "meanflow_guided": Row("MeanFlow, guided", MEANFLOW + GUIDED),
    "improved_meanflow": Row("improved MeanFlow", IMPROVED),
    "improved_meanflow_guided": Row("improved MeanFlow, guided", IMPROVED + GUIDED),
    "tim": Row("Transition Models", TIM),
    "tim_guided": Row("Transition Models, guided", TIM + GUIDED),
}
NAMES = list(ROWS)
GROUPS = {
    "main": NAMES[:3],
    "batches": NAMES[3:8],
    "twice": [f"{name}_64" for name in NAMES[:3]],
    "ablations": NAMES[NAMES.index("eq16") : NAMES.index("self_e_ema")],
    "silences": NAMES[NAMES.index("self_e_ema") : NAMES.index("fed_share")],
    "fed": NAMES[NAMES.index("fed_share") : NAMES.index("matching")],
    "gallery": NAMES[NAMES.index("matching") :],
}
# The differences that decide claims, a minus b.
DIFFERENCES = (
    ("self_e", "flow_matching"),
    ("self_e", "control"),
    ("control", "flow_matching"),
    ("flow_matching_16", "flow_matching"),
    ("self_e", "flow_matching_16"),
    ("self_e", "flow_matching_half"),
    ("self_e_64", "flow_matching"),
    ("self_e_64", "control_64"),
    ("self_e_64", "flow_matching_64"),
    *((name, "self_e") for name in NAMES[NAMES.index("eq16") : NAMES.index("matching")]),
    *((name, "flow_matching") for name in GROUPS["fed"]),
)
# By the rule of results/scenes/README.md.
BUDGET = "--data scenes --side 24 --txt-len 12 --optimizer muon --precision bf16 --grid-every 0 --steps 12000"
SEEDS = (2, 3, 4)

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)


def guidances(objective: str, eta: float | str = 1.0) -> list[dict]:
    """The first settings tried: every guidance in both spaces, at one eta and the objective's own rule for s_k.

    A sampler of the objective's own has a guidance alone to choose; it gets as many values of it as others settings.
    """
    if not OBJECTIVES[objective].walks_as_the_paper:
        return [{"guidance": round(float(w), 3)} for w in np.geomspace(1, GUIDANCE[-1], 19)]
    common = {"eta": eta, "s_rule": OBJECTIVES[objective].s_rules[0], "t_max": 1.0}
    # Without guidance the spaces are alike.
    spaces = [(w, space) for w in GUIDANCE for space in ("v", "x0") if (w, space) != (1, "x0")]
    return [{"guidance": w, "space": space} | common for w, space in spaces]


def ways(objective: str, eta: float | str = 1.0) -> list[dict]:
    """Six ways to take a step, tried at the best guidance: two eta with three rules for s_k each; for a network that
    knows s = t alone, six eta."""
    s_rules = OBJECTIVES[objective].s_rules
    if not OBJECTIVES[objective].walks_as_the_paper:
        return []
    if len(s_rules) == 1:
        return [{"eta": x} for x in (0.0, 0.25, 0.5, 0.75, 1.0, "renoise")]
    return [{"eta": x, "s_rule": rule} for x in (0.0, eta) for rule in s_rules]
