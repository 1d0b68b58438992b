"""Train Self-E: the one loop, from a laptop's CPU to many GPUs (Sec. 3.3, S.2).

    python train.py                                           # the laptop model on single shapes, on this machine
    python train.py --data pictures/ --out runs/mine          # your own folder of captioned pictures
    python train.py --objective flow_matching --out runs/fm   # the baseline of Table 2
    python train.py --resume --out runs/mine                  # go on where a run stopped
    python train.py --size 2b --data tars/ --dry-run          # the plan, its memory and its price; nothing is trained
    torchrun --nproc-per-node 8 train.py --size 2b --data tars/ --out runs/2b   # the paper's model

It prints the plan, then one line with loss, images/s and time left, and at the end the command that samples. It writes
the files that engine/checkpoint.py and engine/monitor.py describe, and grids/step_*.png, pictures of the data's first
prompts. This file reads as the run happens: data, network, moving average, optimizer, processes, the loop. model.py
holds the sizes, recipe.py lengths and rates, engine/arguments.py the flags; engine/feed.py loads the data.

One iteration, as in the paper:

    (x0, c)            a batch of captioned pictures, a tenth of the prompts dropped               engine/feed.py
    loss               Eq. 7 where s = t, Eq. 20 where s < t, weighted with 1 / t^2                losses.SelfE
    gradient           averaged over micro-batches and processes, its norm clipped at 1
    weights, EMA       one step of Adam; then ema <- decay ema + (1 - decay) weights
"""

import contextlib
import copy
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import losses
import model
from engine import arguments, checkpoint, errors, machine, optimizers, price
from engine.feed import Feed, Reading, open_codec
from engine.processes import Ranks, StopSignal
from engine.run import Run, rehearse
from engine.watch import Watch
from objectives import OBJECTIVES

EAGER_STEPS = 20  # iterations before the first picture grid, and before torch.compile comes in
SAVE_SECONDS = 1800  # between states, unless --save-every says otherwise


def train(
    args, plan, folder: Path, device: torch.device, ranks: Ranks, closing: contextlib.ExitStack
) -> None:
    """The run. `closing` closes threads and files, after an error too. Raises UserError."""
    states = checkpoint.complete_states(folder) if args.resume else []
    start = checkpoint.step_of(states[-1]) if states else 0  # iterations made before
    if start > plan.steps:
        raise errors.UserError(f"{folder} is at iteration {start} already, past --steps {plan.steps}")
    entry = OBJECTIVES[args.objective]

    # Data: frozen encoders, and what every iteration from `start` on is made of, as a function of (seed, iteration).
    draws_grids = ranks.is_first and args.grid_every != 0
    codec, sizes = open_codec(plan, arguments.sizes_of(args), device, draws_grids)
    with ranks.first_alone():
        reading = Reading(args.workers, args.index, args.caption_key)
        feed = Feed(plan, entry.draw, args.seed, codec, ranks, start, reading)

    # Network, its moving average, and the objective that holds both.
    precision = arguments.precision_of(args, device, ranks)
    torch.manual_seed(args.seed)
    network = model.Denoiser(**sizes, precision=precision).to(device)
    network.recompute = args.recompute
    if args.init and not args.resume:
        checkpoint.load_init(args.init, network, sizes, codec)
    ema = copy.deepcopy(network).requires_grad_(False)
    objective = entry.build(network, ema, args)  # losses.SelfE, or the module of another --objective

    # Optimizer: Adam, as in the paper, or Muon and Adam.
    zero = args.zero and ranks.world > 1
    optimizer = optimizers.build(plan.optimizer, network, plan.lr, plan.betas, zero)

    # The run's folder, locked while it trains, and the place where a stopped run was.
    config = arguments.config_of(args, plan, sizes, precision, device)
    run = Run(args, plan, folder, ranks, codec, feed, config, start, StopSignal())
    ranks.agree(run.what_all_must_share())
    if ranks.is_first:
        closing.enter_context(checkpoint.taken(folder, args.resume, states))
    state = checkpoint.load_state(states, network, ema, optimizer, run.continuity()) if states else {}
    if ranks.is_first:
        checkpoint.set_back(folder, states)  # to that state: what came after it comes again
    if device.type == "cuda":
        rehearse(run, network, objective, optimizer)

    # Several processes: each computes a part of the batch, and their gradients are averaged.
    step_module = objective
    if ranks.world > 1:
        step_module = DistributedDataParallel(objective, gradient_as_bucket_view=True)

    watch = Watch(run, precision, state, closing)
    stream = feed.stream(start)
    closing.callback(stream.close)
    step, stopping, saved_at = start, False, time.perf_counter()
    while step < plan.steps and not stopping:
        if step == start or step in plan.begins():  # a checkpoint draws at its stage's resolution
            run.config.update(run.pictures_of_stage(step))
        with run.stop.held():
            # The first iterations run uncompiled, so a first picture grid comes before the compiler's minute.
            if step == max(start, EAGER_STEPS):
                watch.say(f"  from iteration {step} on {run.compile(network, ema)}")

            # The gradient of the mean loss over the global batch.
            tau, aux = plan.tau(step), plan.aux(step)  # s.13; whether the auxiliary term has joined (S.1.2)
            count, loss, keys = len(feed.indices(step)), 0.0, []
            for m in range(count):
                batch = next(stream)
                mu = losses.mu_of_length(network.tokens(batch.x0))  # s.12: by the size of these pictures
                # Processes average gradients once an iteration, with the last micro-batch (as in DDP's no_sync()).
                step_module.require_backward_grad_sync = m == count - 1
                part, stats = step_module(
                    batch.x0, batch.c, batch.null, batch.fake, batch.is_null, batch.draws, tau, mu, aux
                )
                (part / count).backward()
                loss = loss + part.detach() / count
                keys += batch.keys
                watch.seen(batch, stats, aux)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), plan.clip)

        # No update from a loss or gradient that is not finite, on any process.
        nonfinite = ~torch.isfinite(loss) | ~torch.isfinite(norm)
        late = args.save_every is None and time.perf_counter() - saved_at > SAVE_SECONDS
        signals = torch.tensor([bool(run.stop), late], device=device)
        bad, stopping, late = ranks.any(nonfinite, *signals)
        if bad:
            stopping |= watch.left_out(step + 1, loss.item(), norm.item(), keys)
        else:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            optimizer.step()
            # With 0.9999 from the start the average would stay near its initialisation for 10,000 iterations.
            decay = min(plan.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
            watch.updated(norm)
        optimizer.zero_grad(set_to_none=False)
        step += 1

        # Log, draw, save.
        watch.log(step)
        if (
            not stopping
            and run.grid_every
            and (step % run.grid_every == 0 or step in (EAGER_STEPS, plan.steps))
        ):
            watch.draw(step, ema)
        stopping |= ranks.world == 1 and bool(run.stop)  # several processes agree on it in the next iteration
        regular = any(every and step % every == 0 for every in (run.save_every, args.milestone_every))
        if stopping or late or regular or step == plan.steps:
            if zero:
                optimizer.consolidate_state_dict(to=0)
            if ranks.is_first:
                checkpoint.save_state(folder, network, ema, optimizer, run.config, watch.state(step), args)
            ranks.barrier()  # no process leaves before the state is on disk: a launcher may end all with the first
            saved_at = time.perf_counter()
    watch.conclude(step)


def main() -> None:
    args = arguments.parse()
    machine.keep_freed_memory()
    plan, folder, ranks = arguments.plan_of(args), Path(args.out), Ranks.of_environment()
    plan.check_division(ranks.world, args.micro_batch)
    if args.dry_run:
        if ranks.is_first:
            price.dry_run(args, plan, ranks.world)
        return
    if not plan.data:
        raise errors.UserError(
            f"--size {args.size} needs --data: a folder of tar shards, or caches (LONG_RUN.md)"
        )
    checkpoint.check_folder(folder, args.resume)
    device = machine.pick_device(args.device)
    if ranks.world > 1 and device.type == "mps":
        raise errors.UserError("several processes cannot share an Apple GPU: one process, or --device cpu")
    with contextlib.ExitStack() as closing:
        closing.enter_context(ranks.connected(device, args.patience))
        train(args, plan, folder, device, ranks, closing)


if __name__ == "__main__":
    sys.exit(errors.run(main, "stopped; --resume goes on from what was saved before, if anything"))
