"""Train Self-E: the one loop, from a laptop's CPU to many GPUs (Sec. 3.3, S.2).

    python train.py                                           # the laptop model on the built-in shapes, on this machine
    python train.py --data pictures/ --out runs/mine          # your own folder of captioned pictures
    python train.py --objective flow_matching --out runs/fm   # the baseline of Table 2
    python train.py --resume --out runs/mine                  # go on where a run stopped
    python train.py --size 2b --data tars/ --dry-run          # the plan, its memory and its price; nothing is trained
    torchrun --nproc-per-node 8 train.py --size 2b --data tars/ --out runs/2b   # the paper's model

It prints the plan, then one line with loss, images/s and time left, and at the end the command that samples. It writes
the files that engine/checkpoint.py and engine/monitor.py describe, and grids/step_*.png, pictures of the data's first
prompts. recipe.py holds sizes, lengths and rates; engine/feed.py loads the data; engine/arguments.py has the flags, and
engine/preparation.py what happens before the first iteration.

One iteration, as in the paper:

    (x0, c)            a batch of captioned pictures, a tenth of the prompts dropped               engine/feed.py
    loss               Eq. 7 where s = t, Eq. 20 where s < t, weighted with 1 / t^2                losses.SelfE
    gradient           averaged over micro-batches and processes, its norm clipped at 1            `gradient`, `train`
    weights, EMA       one step of Adam; then ema <- decay ema + (1 - decay) weights               `update`
"""

import contextlib
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import losses
import recipe
from engine import arguments, checkpoint, errors, machine
from engine.plan import dry_run
from engine.preparation import Run, prepare
from engine.processes import Ranks
from engine.watch import Watch

EAGER_STEPS = 20  # iterations before torch.compile comes in, and the first picture grid
SAVE_SECONDS = 1800  # between states, unless --save-every says otherwise


# ------------------------------------------------------------------------------------------------------------
# One iteration in its two parts: the gradient and the update
# ------------------------------------------------------------------------------------------------------------
def gradient(run: Run, watch: Watch, step: int) -> tuple[torch.Tensor, list[str]]:
    """Leave the gradient of the mean loss over the global batch of iteration `step` in the network.

    Returns this process's mean loss, detached, and the names of its samples.
    """
    tau, aux = run.plan.tau(step), run.plan.aux(step)  # s.13; whether the auxiliary term has joined (S.1.2)
    count, total, keys = len(run.feed.indices(step)), 0.0, []
    for m in range(count):
        batch = next(run.stream)
        mu = losses.mu_of_length(recipe.latent_tokens(run.sizes, batch.x0.shape))  # s.12: by their size
        # What DDP's no_sync() sets: gradients are reduced once an iteration. (Under static_graph no_sync would lose
        # them.)
        run.step_module.require_backward_grad_sync = m == count - 1
        # losses.SelfE, or the module of another --objective (objectives.py), within DDP where processes are several
        loss, stats = run.step_module(
            batch.x0, batch.c, batch.null, batch.fake, batch.is_null, batch.draws, tau, mu, aux
        )
        (loss / count).backward()
        total = total + loss.detach() / count
        keys += batch.keys
        watch.seen(batch, stats, aux)
    return total, keys


def update(run: Run, step: int) -> None:
    """One step of Adam, and of the moving average: ema <- decay ema + (1 - decay) network."""
    for group in run.adam.param_groups:
        group["lr"] = run.plan.learning_rate(step)
    run.adam.step()
    # With 0.9999 from the start the EMA would stay near its initialisation for 10,000 iterations.
    decay = min(run.plan.ema, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(
        list(run.ema.parameters()), list(run.network.parameters()), 0
    )  # the 0 is not used


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------
def train(run: Run, watch: Watch) -> None:
    """From the run's first iteration, or its last state, to its end or a signal to stop.

    Raises UserError where several gradients in a row are not finite; the weights from before them are saved.
    """
    plan, args = run.plan, run.args
    step, stopping = run.start, False  # `step` iterations have been made
    while step < plan.steps and not stopping:
        run.begin_stage(step)
        with run.stop.held():
            # The first iterations run as they are: they end in a first picture grid before the compiler takes its
            # minute.
            if step == max(run.start, EAGER_STEPS):
                watch.say(f"  from iteration {step} on {run.compile()}")
            loss, keys = gradient(run, watch, step)
        norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), plan.clip)

        # No update from a loss or gradient that is not finite, on any process.
        nonfinite = ~torch.isfinite(loss) | ~torch.isfinite(norm)
        late = args.save_every is None and time.perf_counter() - run.saved_at > SAVE_SECONDS
        bad, stopping, late = run.ranks.any(
            nonfinite, *torch.tensor([bool(run.stop), late], device=run.device)
        )
        if bad:
            stopping |= watch.left_out(step + 1, loss.item(), norm.item(), keys)
        else:
            update(run, step)
            watch.updated(norm)
        run.adam.zero_grad(set_to_none=False)
        step += 1

        # Log, draw, save.
        watch.log(step)
        if (
            not stopping
            and run.grid_every
            and (step % run.grid_every == 0 or step in (EAGER_STEPS, plan.steps))
        ):
            watch.draw(step)
        stopping |= run.ranks.world == 1 and bool(
            run.stop
        )  # several processes agree on it in the next iteration
        regular = any(every and step % every == 0 for every in (run.save_every, args.milestone_every))
        if stopping or late or regular or step == plan.steps:
            run.save(step)
    watch.conclude(step)


def main() -> None:
    args = arguments.parse()
    machine.keep_freed_memory()
    plan, folder, ranks = arguments.plan_of(args), Path(args.out), Ranks.of_environment()
    plan.check_division(ranks.world, args.micro_batch)
    states = checkpoint.complete_states(folder)
    if args.resume and not states:
        raise checkpoint.CheckpointError(f"nothing to resume: {folder / 'state'} holds no complete state")
    if not plan.data and not args.dry_run:
        raise errors.UserError(
            f"--size {args.size} needs --data: a folder of tar shards, or caches of them (LONG_RUN.md)"
        )
    if args.dry_run:
        if ranks.is_first:
            dry_run(args, plan, ranks.world, checkpoint.step_of(states[-1]) if args.resume else 0)
        return
    if not args.resume and states:
        raise errors.UserError(
            f"{folder} already holds a run; add --resume to go on, or choose another --out"
        )
    if not args.resume and (folder / "model.safetensors").exists():
        raise errors.UserError(
            f"{folder} already holds a model, without a state to resume: choose another --out, with "
            f"--init {folder} to begin with its weights"
        )
    checkpoint.check_writable(folder)
    device = machine.pick_device(args.device)
    if ranks.world > 1 and device.type == "mps":
        raise errors.UserError("several processes cannot share an Apple GPU: one process, or --device cpu")
    with contextlib.ExitStack() as closing:
        closing.enter_context(ranks.connected(device))
        run = prepare(args, plan, folder, device, ranks, closing)
        train(run, Watch(run, closing))


if __name__ == "__main__":
    errors.run(main, "stopped; what was saved before, if anything, is whole, and --resume goes on from it")
