"""The loop of train.py against the paper's, written out in thirty plain lines; then every line of it is broken once.

First the mathematics: a broken line must end at other weights. Then the rules around it: what is saved, drawn, logged,
left out, and when. What several processes do together (DDP's one reduction, `ranks.any`) is in tests/test_processes.py.
"""

import contextlib
import copy
import json
import math
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from programs import TINY, last, records, steps_of, tensors
from safetensors.torch import load_file

import data
import encoders
import losses
import model
import recipe
from engine import errors, machine, price
from engine.run import Run
from engine.watch import Watch
from rng import rng

ROOT = Path(__file__).parent.parent
STEPS, B, SEED, SIDES, CLIP, AUX_FROM = 12, 4, 3, (16, 24), 0.02, 0.7
LR, LR_END, TAU_UNTIL, DROPOUT, EMA = 4e-3, 1e-5, 0.5, 0.3, 0.4


# ------------------------------------------------------------------------------------------------------------
# The paper's loop (Sec. 3.3, S.2): no data loading in the background, no accumulation, no processes, nothing watched
# ------------------------------------------------------------------------------------------------------------
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
        prompts = [
            "" if rng(SEED, "dropout", g).random() < DROPOUT else s.caption for g, s in zip(index, samples)
        ]
        x0 = pixels.encode(data.to_tensor([s.picture for s in samples]))
        is_null = torch.tensor([prompt == "" for prompt in prompts])
        c, null = text(prompts), text([""] * B)
        fake = text([encoders.fake_prompt(prompt) for prompt in prompts])
        mu = losses.mu_of_length((SIDES[which] // 4) ** 2)
        tau, aux = min(1, step / (TAU_UNTIL * STEPS)), step >= AUX_FROM * STEPS
        draws = losses.draw(SEED, step, index, x0.shape[1:])
        loss, _ = self_e(x0, c, null, fake, is_null, draws, tau, mu, aux)
        network.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in network.parameters()).sqrt()
        for p in network.parameters():
            p.grad *= min(1, CLIP / (norm + 1e-6))
        for group in adam.param_groups:  # one iteration of warm-up, then linearly down
            group["lr"] = LR if step == 0 else LR + (LR_END - LR) * (step - 1) / (STEPS - 1)
        adam.step()
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, p in zip(ema.parameters(), network.parameters()):
                average.copy_(decay * average + (1 - decay) * p)
    return network, ema


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    return the_loop()


# ------------------------------------------------------------------------------------------------------------
# train.py on the same numbers
# ------------------------------------------------------------------------------------------------------------
NEVER = ("--grid-every", "0", "--save-every", "0")


def train_py(
    source: str, out: Path, monkeypatch, flags=NEVER, steps=STEPS, stages=((0, SIDES),), **constants
) -> Path:
    """Run a text of train.py, with other constants, as a program; returns its last state."""
    stages = tuple(recipe.Stage(begin, sides, B) for begin, sides in stages)
    rates = dict(lr=LR, lr_end=LR_END, tau_until=TAU_UNTIL, clip=CLIP, dropout=DROPOUT, txt_len=10, ema=EMA)
    plan = recipe.replace(recipe.RECIPES["laptop"], stages=stages, **rates)
    monkeypatch.setitem(recipe.RECIPES, "laptop", plan)
    monkeypatch.setitem(model.SIZES, "laptop", TINY)
    words = f"--steps {steps} --seed {SEED} --aux-from {AUX_FROM} --device cpu --precision fp32 --no-compile"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split(), "--out", str(out), *flags])
    module = types.ModuleType("train")
    exec(compile(source, "train.py", "exec"), module.__dict__)
    vars(module).update(constants)
    torch.set_num_threads(1)
    module.main()
    return last(out)


def distance(state: Path, expected) -> float:
    """The largest difference of any weight, of the network and of the average."""
    pairs = []
    for name, module in zip(("network", "model"), expected):
        found = load_file(state / f"{name}.safetensors")
        pairs += [(found[key], value) for key, value in module.state_dict().items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
BOUND = 1e-5  # rounding; a step of Adam is 100 times as long


def test_train_py_is_the_papers_loop(expected, tmp_path, monkeypatch):
    assert distance(train_py(SOURCE, tmp_path / "run", monkeypatch), expected) < BOUND


ADAM = "            optimizer.step()\n"  # and what follows it:
AVERAGE = SOURCE.partition(ADAM)[2].partition("            watch.updated")[0]
TABLE = r"""
tau never rises | plan.tau(step), plan.aux | 0.0, plan.aux
tau of the iteration before | plan.tau(step) | plan.tau(max(0, step - 1))
the auxiliary term never joins | plan.aux(step)  # | False  #
prompts ignored | batch.x0, batch.c, | batch.x0, batch.null,
null prompt ignored | batch.c, batch.null, | batch.c, batch.c,
fake prompt ignored | batch.null, batch.fake, | batch.null, batch.c,
dropped prompts unknown | batch.is_null, | batch.is_null & False,
loss scaled, which Adam's eps and clipping see | (part / count).backward() | (part * 1e-3).backward()
clipping switched off | plan.clip) | float("inf"))
learning rate of the iteration after | plan.learning_rate(step) | plan.learning_rate(step + 1)
mu of 16 tokens for all pictures | network.tokens(batch.x0) | 16
no step of Adam | optimizer.step() | pass
decay without its warm-up | min(plan.ema, (1 + step) / (10 + step)) | plan.ema
decay without its end | min(plan.ema, (1 + step) / (10 + step)) | (1 + step) / (10 + step)
decay of the iteration after | (1 + step) / (10 + step) | (2 + step) / (11 + step)
average not moved | torch._foreach_lerp_( | (lambda *_: None)(
gradients not cleared | optimizer.zero_grad(set_to_none=False) | pass
updates left out | if bad: | if bad or step == 7:
an iteration too few | while step < plan.steps and | while step < plan.steps - 1 and
every second iteration | step += 1 | step += 2
no state at the end | late or regular or step == plan.steps: | late or regular:
a batch is skipped | batch = next(stream) | batch = next(stream) if step != 5 else (next(stream), next(stream))[1]
"""
MUTANTS = [row.split(" | ") for row in TABLE.strip().splitlines()]
MUTANTS += [("average before Adam's step", ADAM + AVERAGE, AVERAGE + ADAM)]


@pytest.mark.parametrize("what, old, new", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_broken_loop_is_noticed(what, old, new, expected, tmp_path, monkeypatch):
    assert SOURCE.count(old) == 1, "must occur exactly once in train.py, or this mutant tests nothing"
    try:
        state = train_py(SOURCE.replace(old, new), tmp_path / "run", monkeypatch)
    except (StopIteration, TypeError, ValueError, IndexError, ZeroDivisionError, SystemExit):
        return  # a broken loop may well crash; that is noticed too
    assert distance(state, expected) > 10 * BOUND, f"{what}: not noticed"


# ------------------------------------------------------------------------------------------------------------
# The rules around the mathematics. Each function returns what it found.
# ------------------------------------------------------------------------------------------------------------
RULES, BREACHES = [], []


def rule(right, *changes: tuple[str, str]):
    """What a function below should find, and what of train.py, replaced by what, breaks it."""

    def keep(function):
        RULES.append((function, right))
        BREACHES.extend((function, right, *change) for change in changes)
        return function

    return keep


def spoil(patch, spoilt) -> None:
    """Let `spoilt(call, loss, zero)` stand for the loss of each micro-batch, counted from 1. The gradient of the zero
    is NaN, and so becomes that of the one weight that it is made from."""
    right, calls = losses.SelfE.forward, []

    def forward(self, *batch):
        calls.append(None)
        loss, stats = right(self, *batch)
        weight = next(self.network.parameters())
        return spoilt(len(calls), loss, (0 * weight.sum()).sqrt()), stats

    patch.setattr(losses.SelfE, "forward", forward)


LEFT_OUT = "stopping |= watch.left_out"


@rule(
    ([2], True),
    (" | ~torch.isfinite(norm)", ""),
    (LEFT_OUT, f"optimizer.step()\n            {LEFT_OUT}"),
    ("if bad:", "if False:"),
)
def left_out_for_its_gradient(source, out, patch):
    """The updates left out when the loss of iteration 2 is finite and its gradient is not, and whether network, average
    and Adam's moments are finite then."""
    spoil(patch, lambda call, loss, zero: loss + zero if call == 2 else loss)
    state = train_py(source, out, patch, steps=3)
    finite = all(tensor.isfinite().all() for tensor in tensors(state).values())
    return [r["step"] for r in records(out) if "update_left_out" in r], finite


@rule([2], ("~torch.isfinite(loss) | ", ""), ("loss = loss + part.detach()", "loss = part.detach()"))
def left_out_for_its_loss(source, out, patch):
    """The same when the loss of one micro-batch of two is not finite, and every gradient is."""
    spoil(patch, lambda call, loss, zero: loss + math.inf if call == 3 else loss)
    train_py(source, out, patch, (*NEVER, "--micro-batch", "2"), steps=3, stages=[(0, (16,))])
    return [r["step"] for r in records(out) if "update_left_out" in r]


@rule(
    [2.0, 4],
    ("loss + part.detach() / count", "loss + part.detach()"),
    ("loss = loss + part.detach()", "loss = part.detach()"),
    ("keys += batch.keys", "keys = batch.keys"),
)
def reported(source, out, patch):
    """Loss and number of samples of an iteration of two micro-batches, with losses 1 and 3."""
    found = []
    left_out = lambda self, step, loss, norm, keys: found.extend([loss, len(keys)]) or False  # noqa: E731
    patch.setattr(Watch, "left_out", left_out)
    spoil(patch, lambda call, loss, zero: loss - loss.detach() + (1, 3)[call - 1] + zero)
    train_py(source, out, patch, (*NEVER, "--micro-batch", "2"), steps=1, stages=[(0, (16,))])
    return found


@rule([5], (LEFT_OUT, "watch.left_out"))
def given_up(source, out, patch):
    """The state of a run none of whose gradients is finite: five in a row are too many."""
    spoil(patch, lambda call, loss, zero: loss + zero)
    with pytest.raises(errors.UserError):
        train_py(source, out, patch, steps=7)
    return steps_of(out)


@rule([9], ("watch.updated(norm)", "pass"))
def not_given_up(source, out, patch):
    """The last state of a run with four such iterations, one good one, and four more."""
    spoil(patch, lambda call, loss, zero: loss if call == 5 else loss + zero)
    with contextlib.suppress(errors.UserError):  # given up
        train_py(source, out, patch, steps=9)
    return steps_of(out)


# One pass forward, one backward (that is two), and two evaluations of every second picture
@rule(4 * B * price.forward_flops(TINY, 16, 10), ("seen(batch, stats, aux)", "seen(batch, stats, True)"))
def operations(source, out, patch):
    """Those of an iteration, as metrics.jsonl tells them: the share of a machine's peak that is known here."""
    patch.setattr(machine, "peak_flops", lambda *_: 1e12)
    train_py(source, out, patch, steps=2, stages=[(0, (16,))])
    last = records(out)[-1]
    return round(last["mfu"] * 1e12 / last["iterations_per_s"])


@rule(
    [(2, True, True), (3, True, True)],
    ("watch.log(step)", "pass"),
    ("watch.seen(batch, stats, aux)", "pass"),
    ("watch.updated(norm)", "pass"),
)
def logged(source, out, patch):
    """The lines of metrics.jsonl, and whether they hold the loss and the norm of its gradient."""
    train_py(source, out, patch, (*NEVER, "--log-every", "2"), steps=3)
    return [(r["step"], r["loss"] > 0, r["grad_norm"] > 0) for r in records(out)]


@rule([round((LR + LR_END) / 2, 9)] * 2, ("in optimizer.param_groups:", "in optimizer.param_groups[:1]:"))
def learning_rates(source, out, patch):
    """The last learning rates of Muon's and of Adam's parameters: half-way down."""
    state = train_py(source, out, patch, (*NEVER, "--optimizer", "muon"), steps=3)
    parts = torch.load(state / "adam.pt", weights_only=True)["parts"]
    return [round(group["lr"], 9) for part in parts for group in part["param_groups"]]


@rule(
    list(range(1, 11)),
    ("stopping or late or", "stopping or"),
    ("late = args.save_every is None", "late = False"),
)
def late_states(source, out, patch):
    """The states of a run whose time between states is always over."""
    train_py(source, out, patch, ("--grid-every", "0", "--keep", "99"), steps=10, SAVE_SECONDS=0)
    return steps_of(out)


@rule([3, 6, 7], ("(run.save_every, args.milestone_every)", "(run.save_every,)"), ("or regular or", "or"))
def regular_states(source, out, patch):
    """Those at multiples of --milestone-every, and the last."""
    train_py(source, out, patch, (*NEVER, "--milestone-every", "3", "--keep", "99"), steps=7)
    return steps_of(out)


@rule(
    ([2, 4, 5], ["from iteration 2 on compiled"]),
    ("in (EAGER_STEPS, plan.steps)", "== plan.steps"),
    ("in (EAGER_STEPS, plan.steps)", "== EAGER_STEPS"),
    ("step % run.grid_every == 0 or", ""),
    ("if step == max(start, EAGER_STEPS)", "if step == start"),
    ("step == max(", "step >= max("),
)
def drawn_and_compiled(source, out, patch):
    """The iterations after which pictures are drawn, and what is said of the compiler."""
    drawn, printed = [], []
    patch.setattr(Run, "compile", lambda self, network, ema: "compiled")
    patch.setattr(Watch, "draw", lambda self, step, ema: drawn.append(step))
    patch.setattr(Watch, "say", lambda self, text: printed.append(text.strip()))
    train_py(source, out, patch, ("--grid-every", "4"), steps=5, EAGER_STEPS=2)
    return drawn, printed


@rule(24, ("run.pictures_of_stage(step)", "run.pictures_of_stage(start)"))
def resolution(source, out, patch):
    """That of the pictures, in config.json, after a change."""
    train_py(source, out, patch, steps=4, stages=((0, (16,)), (0.5, (24,))))
    return json.loads((out / "config.json").read_text())["side"]


@rule(True, ("run.stop.held()", "contextlib.nullcontext()"))
def blocked(source, out, patch):
    """Whether SIGINT is blocked while a gradient is computed."""
    found = []
    spoil(patch, lambda call, loss, zero: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])) or loss)
    train_py(source, out, patch, steps=1)
    return signal.SIGINT in found[0]


@rule(
    [2],
    ("stopping |= ranks.world == 1", "stopping |= False"),
    ("if stopping or late", "if late"),
    ("and not stopping:", "and True:"),
)
def stopped(source, out, patch):
    """The states of a run that is told to stop after the update of iteration 2."""
    right, calls = torch.optim.Adam.step, []

    def step(self, *a, **k):
        calls.append(None)
        right(self, *a, **k)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(torch.optim.Adam, "step", step)
    with contextlib.suppress(SystemExit):  # 128 and the signal's number
        train_py(source, out, patch, steps=5)
    return steps_of(out)


@pytest.mark.parametrize("rule, right", RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_rule_of_the_loop(rule, right, tmp_path, monkeypatch):
    assert rule(SOURCE, tmp_path / "run", monkeypatch) == right


@pytest.mark.parametrize("rule, right, old, new", BREACHES, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_rule_is_noticed(rule, right, old, new, tmp_path, monkeypatch):
    assert SOURCE.count(old) == 1, "must occur exactly once in train.py, or this mutant tests nothing"
    try:
        found = rule(SOURCE.replace(old, new), tmp_path / "run", monkeypatch)
    except (IndexError, KeyError, errors.UserError):
        return  # nothing to be found is noticed too
    assert found != right, f"{old!r} -> {new!r} breaks {rule.__name__} unnoticed"
