"""The recipe against the paper's numbers, and the arithmetic of positions and divisions."""

import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import losses
import model
import objectives
import recipe
import sampler
from engine import arguments, errors, price

SILENCES = (Path(__file__).parent.parent / "SILENCES.md").read_text(encoding="utf-8")

BIG, SMALL, LAPTOP = (recipe.RECIPES[size] for size in ("2b", "0.5b", "laptop"))
BIG_NET, SMALL_NET = model.SIZES["2b"], model.SIZES["0.5b"]


def default(function, name: str):
    """What an argument is when it is not given."""
    return inspect.signature(function).parameters[name].default


NETS, RECIPES = (BIG_NET, SMALL_NET), (BIG, SMALL)
ALIKE = [(plan.lr, plan.lr_end, plan.betas, plan.ema, plan.guidance) for plan in RECIPES]
ONE_DEVIATION = losses.sample_times(
    torch.ones(1), torch.ones(1), torch.tensor([], dtype=torch.int64), 0.0, 1.0
)
EXPONENT = math.log(losses.time_weight(torch.tensor(0.01).double()), 0.01)

# Every constant of the paper that training or sampling needs, typed from the paper's text, beside ours.
PAPER = [  # section, what the paper says, its number, ours
    ("3.4", "s_k is the next timestep t_(k+1) by default", 0.0, default(sampler.trajectory, "s_rule")),
    ("3.4", "guidance with w = 5", 5.0, BIG.guidance),
    ("4", "the 2B model is trained with 512 x 512 pictures", 512, max(BIG.stages[-1].sides)),
    ("4.2", "ablations: 256 x 256 pixels", [(256,)], [stage.sides for stage in SMALL.stages]),
    ("4.2", "ablations: batch size 1024", [1024], [stage.batch_size for stage in SMALL.stages]),
    ("4.2", "ablations: other settings as in Sec. 4.1", ALIKE[0], ALIKE[1]),
    ("4.2", "ablations: reported after 300k iterations (Table 2)", 300_000, SMALL.steps),
    ("S.1.2", "in practice k = 0.9", 0.9, default(losses.SelfE, "k")),
    ("S.1.2", "k = 0.9, as a flag", 0.9, arguments.parse([]).k),
    ("S.2", "256^2 pixels, then also 512^2", [(256,), (256, 512)], [stage.sides for stage in BIG.stages]),
    ("S.2", "500k iterations of the first", 500_000, BIG.begins()[1]),
    ("S.2", "batch sizes 1024 and 768", [1024, 768], [stage.batch_size for stage in BIG.stages]),
    ("S.2", "batch proportion 1:1", 1.0, [BIG.side(600_000 + i) for i in range(100)].count(512) / 50),
    ("S.2", "until 710k iterations", 710_000, BIG.steps),
    ("S.2", "auxiliary from 550k on", [False, True], [BIG.aux(step) for step in (549_999, 550_000)]),
    ("S.2", "Adam", "adam", BIG.optimizer),
    ("S.2", "beta1 and beta2", (0.9, 0.95), BIG.betas),
    ("S.2", "warm-up of 1000 iterations", 1000, BIG.warmup_steps()),
    ("S.2", "half-way through the warm-up", 1.5e-4, BIG.learning_rate(499)),
    ("S.2", "after it the learning rate 3e-4", 3e-4, BIG.learning_rate(1000)),
    ("S.2", "half-way through the linear decay", 1.55e-4, BIG.learning_rate(1000 + 709_000 // 2)),
    ("S.2", "in the end 1e-5", 1e-5, BIG.learning_rate(710_000)),
    ("S.2", "EMA 0.9999", 0.9999, BIG.ema),
    ("S.2 (a)", "z-channels 16", [16, 16], [size["channels"] for size in NETS]),
    ("S.2 (a)", "compression 8 of height and width", [8, 8], [plan.factor() for plan in RECIPES]),
    ("S.2 (b)", "patch size 2", [2, 2], [size["patch"] for size in NETS]),
    ("S.2 (b)", "256 tokens at 256^2 pixels", 256, price.image_tokens(BIG_NET, 256, BIG.factor())),
    ("S.2 (b)", "each of dimension 64", 64, BIG_NET["channels"] * BIG_NET["patch"] ** 2),
    ("S.2 (c)", "text tokens of dimension 4096", [4096, 4096], [size["txt_dim"] for size in NETS]),
    ("S.2 (c)", "a pooled vector of dimension 768", [768, 768], [size["vec_dim"] for size in NETS]),
    ("S.2 (d)", "width 2048, and 1024 for ablations", [2048, 1024], [size["width"] for size in NETS]),
    ("S.2 (d)", "heads of size 128 and 64", [128, 64], [size["width"] // size["heads"] for size in NETS]),
    ("S.2 (d)", "16 heads", [16, 16], [size["heads"] for size in NETS]),
    ("S.2 (d)", "8 double-stream blocks", [8, 8], [size["double"] for size in NETS]),
    ("S.2 (d)", "16 single-stream blocks", [16, 16], [size["single"] for size in NETS]),
    ("S.2 (d)", "RoPE over (t, y, x)", [(16, 56, 56), (8, 28, 28)], [tuple(size["axes"]) for size in NETS]),
    ("S.2, s.11", "z ~ N(0, 1): t_raw at one deviation", 1 / (1 + math.exp(-1)), ONE_DEVIATION[0].item()),
    ("S.2, s.12", "mu 0.5 at length 512", 0.5, losses.mu_of_length(512)),
    ("S.2, s.12", "mu 1.15 at length 4096", 1.15, losses.mu_of_length(4096)),
    ("S.2", "s = t with p = 0.5", 0.5, 1 - objectives.OBJECTIVES["self_e"].below),
    ("S.2, s.13", "tau up to 300k", [0, 0.5, 1, 1], [BIG.tau(n * 1000) for n in (0, 150, 300, 700)]),
    ("S.2", "w_(s,t) = 1 / t^2: the exponent", -2.0, EXPONENT),
    ("S.2", "eta = 1 at inference", 1.0, default(sampler.trajectory, "eta")),
]

# Constants on which the paper is silent: ours, and the row of SILENCES.md that says so.
SILENT = [  # row, what, our number, ours, how the row writes it
    (3, "share of prompts dropped", [0.1] * 3, [plan.dropout for plan in (*RECIPES, LAPTOP)], "0.1"),
    (13, "ablations: tau rises over the run", 300_000, SMALL.tau_until * SMALL.steps, "300k"),
    (13, "ablations: the auxiliary term never joins", False, SMALL.aux(SMALL.steps - 1), "300k"),
    (16, "tokens of a caption", [256, 256], [plan.txt_len for plan in RECIPES], "256"),
    (16, "tokens of a caption of the laptop's", 14, LAPTOP.txt_len, "14"),
    (34, "Adam of the laptop", (0.9, 0.99), LAPTOP.betas, "0.99"),
    (20, "largest norm of a gradient", [1.0] * 3, [plan.clip for plan in (*RECIPES, LAPTOP)], "1.0"),
    (37, "guidance of the laptop model", 1.5, LAPTOP.guidance, "1.5"),
]


@pytest.mark.parametrize(
    "section, what, papers, ours", PAPER, ids=[f"{line[0]}: {line[1]}" for line in PAPER]
)
def test_the_constants_of_the_paper(section, what, papers, ours):
    assert ours == (pytest.approx(papers) if isinstance(papers, float) else papers)


@pytest.mark.parametrize("row, what, number, ours, written", SILENT, ids=[line[1] for line in SILENT])
def test_the_constants_that_the_paper_leaves_open(row, what, number, ours, written):
    assert ours == number
    (line,) = [line for line in SILENCES.splitlines() if line.startswith(f"| {row} |")]
    assert written in re.findall(r"\d+(?:\.\d+)?k?", line.split("|", 2)[2])


def test_positions_never_repeat_and_start_stages_at_whole_batches():
    plan = recipe.make("2b", steps=50)  # stages of 35 and 15 iterations: 35 * 1024 is no multiple of 768
    spans = [(plan.first(step), plan.first(step) + plan.stage(step).batch_size) for step in range(50)]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % plan.stage(step).batch_size == 0 for step, (begin, _) in enumerate(spans))
    assert spans[35][0] - spans[34][1] < 768


def test_short_runs_keep_the_papers_proportions():
    plan = recipe.make("2b", steps=710)
    assert plan.begins() == [0, 500, 710] and plan.tau(300) == 1 > plan.tau(299)
    assert plan.aux(550) and not plan.aux(549)
    assert plan.learning_rate(35) == pytest.approx(3e-4)  # the warm-up is at most 5% of the run


def test_changes_of_side_and_batch_merge_stages_that_become_alike():
    plan = recipe.make("2b", side=256, batch_size=512)
    assert [(stage.sides, stage.batch_size) for stage in plan.stages] == [((256,), 512)]
    assert len(recipe.make("2b", batch_size=512).stages) == 2
    assert recipe.make("2b").stages == recipe.RECIPES["2b"].stages


@pytest.mark.parametrize(
    "size, world, micro, batch, group",
    [("2b", 7, 16, None, 2), ("0.5b", 12, 64, None, 2), ("laptop", 5, None, 32, 2), ("laptop", 2, 8, 36, 4)],
)
def test_a_refusal_names_a_batch_that_divides(size, world, micro, batch, group):
    with pytest.raises(errors.UserError) as refused:
        recipe.make(size, batch_size=batch, group=group).check_division(world, micro)
    near = int(re.findall(r"\d+", str(refused.value))[-1])
    recipe.make(size, batch_size=near, group=group).check_division(world, micro)


def test_a_micro_batch_that_no_batch_suits_is_refused_itself():
    with pytest.raises(errors.UserError, match="--micro-batch must be a multiple of 2, not 3"):
        recipe.make("laptop", batch_size=32).check_division(1, 3)


@pytest.mark.parametrize("world", [1, 8, 16, 32, 64])
def test_the_2b_batch_divides_over_the_usual_numbers_of_gpus(world):
    plan = recipe.RECIPES["2b"]
    plan.check_division(world)
    for stage in plan.stages:
        for side in stage.sides:
            micro = plan.micro_batch_of(stage, side, world)
            assert stage.batch_size % (world * micro) == micro % 2 == 0
            assert micro * side**2 <= max(16 * 256**2, 2 * side**2)
