"""The loop of train.py against the paper's, written out in thirty plain lines;
then every line of train.py's is broken once."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import encoders
import losses
import model
import recipe
from engine import checkpoint
from engine.randomness import rng

ROOT = Path(__file__).parent.parent
TINY = dict(width=16, heads=2, double=1, single=1, axes=(2, 2, 4), channels=3, patch=4, txt_dim=256, vec_dim=256)
STEPS, B, SEED, SIDES, CLIP, AUX_FROM = 20, 4, 3, (16, 24), 0.02, 0.7
LR, LR_END, TAU_UNTIL, DROPOUT = 4e-3, 1e-5, 0.5, 0.3


# ---------------------------------------------------------------------------------------------------------------------
# The paper's loop (Sec. 3.3, S.2): no data loading in the background, no accumulation, no processes, nothing watched
# ---------------------------------------------------------------------------------------------------------------------
def the_loop() -> tuple[model.Denoiser, model.Denoiser]:
    """The network and its moving average after STEPS iterations; pictures of two resolutions take turns."""
    text, pixels = encoders.text_encoder("words", 10, "cpu"), encoders.autoencoder("pixels", "cpu")
    sources = [data.Shapes(side, "one-shape") for side in SIDES]
    torch.manual_seed(SEED)
    network = model.Denoiser(**TINY)
    ema = copy.deepcopy(network).requires_grad_(False)
    self_e = losses.SelfE(network, ema)
    adam = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99), fused=True)
    for step in range(STEPS):
        turn, which = divmod(step, 2)
        samples = [sources[which].sample(turn * B + i, SEED) for i in range(B)]
        index = [step * B + i for i in range(B)]
        prompts = ["" if rng(SEED, "dropout", g).random() < DROPOUT else s.caption for g, s in zip(index, samples)]
        x0 = pixels.encode(data.to_tensor([s.picture for s in samples]))
        is_null = torch.tensor([prompt == "" for prompt in prompts])
        c, null, fake = text(prompts), text([""] * B), text([encoders.fake_prompt(prompt) for prompt in prompts])
        self_e.mu = losses.mu_of_length((SIDES[which] // 4) ** 2)
        tau, aux = min(1, step / (TAU_UNTIL * STEPS)), step >= AUX_FROM * STEPS
        loss, _ = self_e(x0, c, null, fake, is_null, losses.draw(SEED, step, index, x0.shape[1:]), tau, aux)
        network.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in network.parameters()).sqrt()
        for p in network.parameters():
            p.grad *= min(1, CLIP / (norm + 1e-6))
        for group in adam.param_groups:  # one iteration of warm-up, then linearly down
            group["lr"] = LR if step == 0 else LR + (LR_END - LR) * (step - 1) / (STEPS - 1)
        adam.step()
        decay = min(0.9999, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, p in zip(ema.parameters(), network.parameters()):
                average.copy_(decay * average + (1 - decay) * p)
    return network, ema


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    return the_loop()


# ---------------------------------------------------------------------------------------------------------------------
# train.py on the same numbers
# ---------------------------------------------------------------------------------------------------------------------
def train_py(source: str, out: Path, monkeypatch) -> Path:
    """Run a text of train.py as a program; returns its last state."""
    stage = recipe.Stage(0, SIDES, B)
    plan = recipe.replace(recipe.RECIPES["laptop"], stages=(stage,), lr=LR, lr_end=LR_END, tau_until=TAU_UNTIL,
                          clip=CLIP,
                          dropout=DROPOUT, txt_len=10)  # fmt: skip
    monkeypatch.setitem(recipe.RECIPES, "laptop", plan)
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    monkeypatch.setattr(sys, "argv",
                        ["train.py", "--steps", str(STEPS), "--seed", str(SEED), "--out", str(out), "--aux-from",
                                      str(AUX_FROM), "--device", "cpu", "--precision", "fp32", "--no-compile",
                                      "--grid-every",
                                      "0", "--save-every", "0"])  # fmt: skip
    module = types.ModuleType("train")
    exec(compile(source, "train.py", "exec"), module.__dict__)
    torch.set_num_threads(1)
    module.main()
    return checkpoint.complete_states(out)[-1]


def distance(state: Path, expected) -> float:
    """The largest difference of any weight, of the network and of the average."""
    worst = 0.0
    for name, module in zip(("network", "model"), expected):
        found = load_file(state / f"{name}.safetensors")
        worst = max(worst, *(float((found[key] - value).abs().max()) for key, value in module.state_dict().items()))
    return worst


SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
BOUND = 1e-5  # rounding; a step of Adam is 100 times as long


def test_train_py_is_the_papers_loop(expected, tmp_path, monkeypatch):
    assert distance(train_py(SOURCE, tmp_path / "run", monkeypatch), expected) < BOUND


MUTANTS = [  # (what is wrong, the text, its replacement)
    ("tau never rises", "run.plan.tau(step), run.plan", "0.0, run.plan"),
    ("tau of the iteration before", "run.plan.tau(step)", "run.plan.tau(max(0, step - 1))"),
    ("the auxiliary term never joins", "run.plan.aux(step)  #", "False  #"),
    ("mu not set by the picture's size", "if hasattr(run.objective", "if False and hasattr(run.objective"),
    ("prompts ignored", "step_module(batch.x0, batch.c,", "step_module(batch.x0, batch.null,"),
    ("null prompt ignored", "batch.c, batch.null,", "batch.c, batch.c,"),
    ("fake prompt ignored", "batch.null, batch.fake,", "batch.null, batch.c,"),
    ("dropped prompts unknown", "batch.is_null,", "batch.is_null & False,"),
    ("loss scaled", "(loss / count).backward()", "(loss * 1e-3).backward()"),  # Adam's eps, and clipping, see it
    ("clipping switched off", "plan.clip)", 'float("inf"))'),
    ("learning rate of the iteration before", "run.plan.learning_rate(step)",
     "run.plan.learning_rate(max(0, step - 1))"),
    ("no step of Adam", "    run.adam.step()", "    pass"),
    ("decay without its warm-up", "min(run.plan.ema, (1 + step) / (10 + step))", "run.plan.ema"),
    ("decay of the iteration after", "(1 + step) / (10 + step)", "(2 + step) / (11 + step)"),
    ("average and network exchanged", "(list(run.ema.parameters()), list(run.network.parameters()), 0)",
     "(list(run.network.parameters()), list(run.ema.parameters()), 0)"),
    ("average not moved", "    get_ema_multi_avg_fn(decay)(", "    (lambda *_: None)("),
    ("gradients not cleared", "run.adam.zero_grad(set_to_none=False)", "pass"),
    ("updates left out", "        if bad:", "        if bad or step == 7:"),
    ("an iteration too few", "while step < plan.steps and", "while step < plan.steps - 1 and"),
    ("a batch is skipped", "        batch = next(run.stream)",
     "        batch = next(run.stream) if step != 5 else (next(run.stream), next(run.stream))[1]"),
]  # fmt: skip


@pytest.mark.parametrize("what, old, new", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_broken_loop_is_noticed(what, old, new, expected, tmp_path, monkeypatch):
    assert SOURCE.count(old) == 1, f"{old!r} must occur exactly once in train.py, or this mutant tests nothing"
    try:
        state = train_py(SOURCE.replace(old, new), tmp_path / "run", monkeypatch)
    except (StopIteration, TypeError, ValueError, IndexError, ZeroDivisionError):
        return  # a broken loop may well crash; that is noticed too
    assert distance(state, expected) > 10 * BOUND, f"{what}: not noticed"
