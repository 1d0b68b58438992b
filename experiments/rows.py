"""What the tables compare: rows, the differences that decide claims, the budget, the grid of settings searched."""

import recipe

# Flow matching's best guidance at most step counts, by the search on validation prompts; one scale for all peers.
GUIDED = ["--train-guidance", "3"]
# The rows: title, flags of train.py, the paper's GenEval scores at 2, 4, 8 and 50 steps (Table 2) where it has some.
ROWS = {
    "flow_matching": ("Flow Matching", ["--objective", "flow_matching"], (0.2523, 0.6075, 0.7155, 0.7311)),
    "imm": ("IMM", ["--objective", "imm"], (0.2617, 0.5994, 0.7112, 0.7472)),
    "imm_coarse": ("IMM, fewer and coarser steps (k = 6)", ["--objective", "imm", "--imm-k", "6"], None),
    "self_e": (
        'Self-E, classifier score only ("Ours")',
        ["--aux-from", "1"],
        (0.6097, 0.7121, 0.7490, 0.7543),
    ),
    "eq16": (
        "w/o target norm. (Eq. 16 to the letter)",
        ["--aux-from", "1", "--target", "sum"],
        (0.5555, 0.6156, 0.6521, 0.7018),
    ),
    "eq18": ("Eq. 18 as target", ["--aux-from", "1", "--target", "tar"], None),
    "control": ("control: Eq. 19 with Delta = 0", ["--aux-from", "1", "--delta-scale", "0"], None),
    "self_e_ema": ("Self-E, both branches by the EMA", ["--aux-from", "1", "--null-branch", "ema"], None),
    "aux_throughout": ("w/ aux. term throughout", ["--aux-from", "0"], (0.3307, 0.4304, 0.5153, 0.6166)),
    "aux_late": ("Self-E, aux. term late", ["--aux-from", f"{recipe.AUX_FROM:.4f}"], None),
    "imm_coarsest": ("IMM, coarser still (k = 3)", ["--objective", "imm", "--imm-k", "3"], None),
    # The gallery: other any-step objectives (peers/), without and with guidance in their targets.
    "matching": ("Distribution matching (Self-E, k = 0)", ["--aux-from", "0", "--k", "0"], None),
    "shortcut": ("Shortcut models", ["--objective", "shortcut"], None),
    "shortcut_guided": ("Shortcut models, guided", ["--objective", "shortcut", *GUIDED], None),
    "meanflow": ("MeanFlow", ["--objective", "meanflow"], None),
    "meanflow_guided": ("MeanFlow, guided", ["--objective", "meanflow", *GUIDED], None),
    "improved_meanflow": ("Improved MeanFlow", ["--objective", "improved_meanflow"], None),
    "improved_meanflow_guided": (
        "Improved MeanFlow, guided",
        ["--objective", "improved_meanflow", *GUIDED],
        None,
    ),
    "tim": ("Transition Models", ["--objective", "tim"], None),
    "tim_guided": ("Transition Models, guided", ["--objective", "tim", *GUIDED], None),
}
GALLERY = (
    "matching",
    "shortcut",
    "shortcut_guided",
    "meanflow",
    "meanflow_guided",
    "improved_meanflow",
    "improved_meanflow_guided",
    "tim",
    "tim_guided",
)
GROUPS = {"table2": tuple(row for row in ROWS if row not in GALLERY), "gallery": GALLERY}
# The differences of rows that decide claims.
DIFFERENCES = (
    ("self_e", "flow_matching"),
    ("self_e", "control"),
    ("control", "flow_matching"),
    ("self_e", "imm"),
    ("self_e", "imm_coarse"),
    ("self_e", "imm_coarsest"),
    ("self_e", "eq16"),
    ("self_e", "eq18"),
    ("self_e", "aux_throughout"),
    ("aux_late", "self_e"),
    ("aux_late", "flow_matching"),
    ("aux_late", "control"),
    ("self_e_ema", "self_e"),
    ("self_e_ema", "control"),
    *((row, "self_e") for row in GALLERY),
)
PROGRESS = ("flow_matching", "self_e")  # the rows of Fig. 5, scored along their training
PAPER_NOTE = (
    "GenEval of 0.5B models after 300k iterations; w/o target norm. and w/ aux. term after 100k, when "
    "its Ours has 0.544, 0.638, 0.682 and 0.716"
)
# Single shapes, two captions in five those of another picture. The setting was chosen on seeds 0 and 1: not these.
# The longest of these prompts has six words.
BUDGET = "--data one-shape --wrong-captions 0.4 --txt-len 8 --steps 9000 --grid-every 0"
SEEDS = (2, 3, 4)
GRID = {"guidance": (1.0, 1.5, 2.0, 3.0, 5.0), "eta": (0.0, 1.0)}
