"""How fast a training step is here, and what it spends its time on (S.2; every figure measured in one run).

    python benchmark.py                                       # the laptop model on this machine
    python benchmark.py --size 0.5b --blocks 1 1 --batch 4    # one double and one single block of the 0.5B model
    python benchmark.py --size 2b --batch 16                  # on a GPU

Prints and, with --out, writes as JSON: the steps of flow matching, Self-E (tau = 1) and Self-E with the auxiliary term,
taken in turns so that the machine's moods hit all alike; forward + backward beside diffusers' FluxTransformer2DModel of the
same size; the optimizer's and the average's share; how long the loop waits for data, and what torch.compile still compiles
after its warm-up over all picture sizes of the data; and the share of the machine's own matrix-product peak (MFU), with the
operations counted by `model.forward_flops`, a backward pass as two forward passes and no credit for recomputation.
"""

import copy
import dataclasses
import functools
import statistics
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.optim.swa_utils import get_ema_multi_avg_fn

import checkpoint
import errors
import losses
import machine
import model
import recipe
import train
from feed import Feed

# The steps compared, and their forward-pass equivalents per picture.
FORWARDS = {"flow matching": recipe.FORWARDS["flow_matching"], "Self-E": recipe.FORWARDS["self_e"], "Self-E + aux": recipe.FORWARDS["aux"]}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(work, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def in_turns(works: dict, device: torch.device, repeats: int) -> dict[str, float]:
    """The median seconds of each piece of work, taken in turns after two warm-up rounds."""
    times = {name: [] for name in works}
    for i in range(repeats + 2):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if i >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def on_real_data(args, size: dict, work, device: torch.device) -> dict:
    """Self-E steps on batches as training reads them: what the loop waits for, and what is compiled late.

    work(batch) is one step. The first half of the steps is the warm-up, in which every picture size should be met; what is
    returned is of the second half, on pictures not read before, with one thread reading ahead as in train.py. Raises
    DataError or UserError when the data cannot be used with this model.
    """
    plan = recipe.make(args.size, data=args.data and tuple(args.data), batch_size=args.batch, side=args.side, txt_len=args.txt_len,
                       micro_batch=args.batch, aux_from=1.0)  # fmt: skip
    plan = dataclasses.replace(plan, steps=4 * args.repeats, stages=plan.stages[:1])
    text, autoencoder, sizes, factor = train.open_encoders(None, plan, device, chief=False)  # no arguments: it draws no grids
    if any(size[name] != value for name, value in sizes.items()):
        raise errors.UserError(f"{' '.join(plan.data)} gives {sizes}: not the sizes of --size {args.size}")
    feed = Feed(plan, functools.partial(losses.draw, p_equal=0.5), 0, text, autoencoder, device, patch=size["patch"],
                channels=size["channels"], factor=factor, workers=1)  # fmt: skip
    stats, met, half = counters["stats"], set(), plan.steps // 2
    graphs = [stats["unique_graphs"]]
    for step, batch in enumerate(feed.stream(0)):
        if step == half:
            graphs.append(stats["unique_graphs"])
            feed.waited, start = 0.0, time.perf_counter()
        met.add(tuple(batch.x0.shape[2:]))
        work(batch)
        wait(device)  # as train.py does once an iteration
    return {"data": list(plan.data), "steps": half, "picture_sizes": len(met), "seconds": time.perf_counter() - start, "waited": feed.waited,
            "compiled_in_warm_up": graphs[1] - graphs[0], "compiled_after": stats["unique_graphs"] - graphs[1]}  # fmt: skip


def diffusers_flux(size: dict, device: torch.device):
    """diffusers' FluxTransformer2DModel of the same size, and how to call it with our inputs; None without diffusers."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        return None
    values = size["channels"] * size["patch"] ** 2
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=values, num_layers=size["double"], num_single_layers=size["single"],
        attention_head_dim=size["width"] // size["heads"], num_attention_heads=size["heads"],
        joint_attention_dim=size["txt_dim"], pooled_projection_dim=size["vec_dim"], guidance_embeds=False,
        axes_dims_rope=size["axes"]).to(device)  # fmt: skip

    def call(tokens, t, txt, vec, precision):
        ids = torch.zeros(tokens.shape[1], 3, device=device)
        side = int(tokens.shape[1] ** 0.5)
        ids[:, 1], ids[:, 2] = (axis.flatten().to(device) for axis in
                                torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))  # fmt: skip
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return flux(hidden_states=tokens, encoder_hidden_states=txt, pooled_projections=vec, timestep=t, img_ids=ids,
                        txt_ids=torch.zeros(txt.shape[1], 3, device=device), return_dict=False)[0]  # fmt: skip

    return flux, call


def main() -> None:
    parser = errors.Parser("benchmark.py", "Measure a training step on this machine.")
    a = parser.add_argument
    a("--size", default="laptop", choices=list(model.SIZES), help="which model (default: laptop)")
    a("--blocks", metavar="N", type=int, nargs=2, help="double and single blocks instead of the size's own")
    a("--batch", metavar="N", type=int, default=64, help="pictures a step, even (default: 64)")
    a("--side", metavar="N", type=int, help="side of the pictures in pixels (default: the recipe's)")
    a("--data", metavar="DIR", nargs="+", help="what training would read (default: one-shape for laptop, else not measured)")
    a("--txt-len", metavar="N", type=int, help="text tokens (default: the recipe's)")
    a("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="inside the network (default: the faster)")
    a("--compile", action="store_true", help="torch.compile each block")
    a("--recompute", metavar="N", type=int, default=0, help="blocks that recompute their activations (default: 0)")
    a("--repeats", metavar="N", type=int, default=7, help="measured rounds (default: 7)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--out", metavar="FILE", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.batch < 2 or args.batch % 2 or args.repeats < 1 or (args.txt_len or 1) < 1:
        parser.error("--batch must be even and at least 2, --repeats and --txt-len at least 1")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: no such folder: {args.out.parent}")
    plan = recipe.RECIPES[args.size]
    multiple = model.SIZES[args.size]["patch"] * plan.factor()
    if args.side is not None and (args.side < multiple or args.side % multiple):
        parser.error(f"--side must be a multiple of {multiple}")

    machine.keep_freed_memory()
    device = machine.pick_device(args.device)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.precision) or machine.pick_precision(device)
    size = dict(model.SIZES[args.size])
    if args.blocks:
        size["double"], size["single"] = args.blocks
    pixels = args.side or plan.stages[0].sides[0]
    side = pixels // plan.factor()
    text_tokens = args.txt_len or plan.txt_len
    image_tokens = recipe.image_tokens(size, pixels, plan.factor())
    B, shape = args.batch, (size["channels"], side, side)

    torch.manual_seed(0)
    network = model.Denoiser(**size, precision=precision).to(device)
    network.recompute = args.recompute
    ema = copy.deepcopy(network).requires_grad_(False)
    if args.compile:
        machine.allow_shapes(64)
        network.compile_blocks()
        ema.compile_blocks()
    objective = losses.SelfE(network, ema, mu=losses.mu_of_length(image_tokens))
    adam = torch.optim.Adam(network.parameters(), lr=1e-4, betas=plan.betas, fused=True)
    average = get_ema_multi_avg_fn(0.9999)
    calls = {"n": 0.0}
    for net in (network, ema):  # counts forward passes in units of the whole batch
        net.register_forward_pre_hook(lambda m, inputs: calls.__setitem__("n", calls["n"] + len(inputs[0]) / B))

    x0 = torch.randn(B, *shape, device=device)
    c, null, fake = ((torch.randn(B, text_tokens, size["txt_dim"], device=device), torch.randn(B, size["vec_dim"], device=device))
                     for _ in range(3))  # fmt: skip
    is_null = torch.zeros(B, dtype=torch.bool, device=device)
    draws = {p: losses.draw(0, 0, list(range(B)), shape, p, device) for p in (0.5, 1.0)}

    def update():
        adam.step()
        average(list(ema.parameters()), list(network.parameters()), 0)

    def step(*inputs):
        objective(*inputs)[0].backward()
        update()
        adam.zero_grad(set_to_none=False)

    arguments = x0, c, null, fake, is_null, draws[0.5], 1.0, False
    steps = {
        "flow matching": lambda: step(x0, c, null, fake, is_null, draws[1.0], 1.0, False),
        "Self-E": lambda: step(*arguments),
        "Self-E + aux": lambda: step(x0, c, null, fake, is_null, draws[0.5], 1.0, True),
    }
    forwards = {}
    for name, work in steps.items():
        calls["n"] = 0.0
        work()
        forwards[name] = calls["n"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def forward_backward():
        objective(*arguments)[0].backward()

    parts = {"forward": lambda: objective(*arguments), "forward + backward": forward_backward, "Adam + EMA": update}
    peak = {"float32": 0.0, "bfloat16": 0.0}

    def measure_peak():  # between the steps, so that both see the same machine, and the best of all rounds
        for name in peak:
            peak[name] = max(peak[name], machine.peak_flops(device, getattr(torch, name)))

    medians = in_turns(steps | parts, device, args.repeats)
    adam.zero_grad(set_to_none=False)
    if device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated(device) / 2**30  # before the large matrices of the peak
    in_turns({"Self-E": steps["Self-E"], "peak": measure_peak}, device, 5)
    used = str(precision).removeprefix("torch.")
    flops = model.forward_flops(size, image_tokens, text_tokens)

    report = machine.provenance(device) | {
        "size": args.size, "blocks": [size["double"], size["single"]], "batch": B,
        "image_tokens": image_tokens, "text_tokens": text_tokens, "precision": used, "compiled": args.compile, "recompute": args.recompute,
        "peak_tflops": {name: round(value / 1e12, 3) for name, value in peak.items()}, "steps": {},
    }  # fmt: skip
    print(f"{args.size} ({size['double']} + {size['single']} blocks), batch {B}, {image_tokens} + {text_tokens} tokens, {used}"
          f"{', compiled' if args.compile else ''}, on {report['hardware']}")  # fmt: skip
    print("matrix-product peak: " + ", ".join(f"{v / 1e12:.2f} TFLOP/s in {k}" for k, v in peak.items()))
    print(f"{'step':16}{'ms':>9}{'images/s':>10}{'x flow matching':>17}{'forward passes':>16}{'TFLOP/s':>9}{'of peak':>9}")
    for name in steps:
        t = medians[name]
        rate = FORWARDS[name] * flops * B / t
        row = {"seconds": t, "images_per_s": B / t, "ratio": t / medians["flow matching"], "forwards": forwards[name],
               "tflops": rate / 1e12, "mfu": rate / peak[used]}  # fmt: skip
        report["steps"][name] = row
        print(f"{name:16}{t * 1e3:9.1f}{row['images_per_s']:10.1f}{row['ratio']:17.3f}{forwards[name]:16.1f}"
              f"{row['tflops']:9.3f}{row['mfu']:9.1%}")  # fmt: skip
    share = medians["Adam + EMA"] / medians["Self-E"]
    report["adam_and_ema_share"] = share
    split = {"forward": medians["forward"], "backward": medians["forward + backward"] - medians["forward"], "Adam + EMA": medians["Adam + EMA"]}
    report["self_e_split_seconds"] = split
    print("a Self-E step: " + ", ".join(f"{name} {t * 1e3:.1f} ms" for name, t in split.items()) + f" ({share:.1%} of it)")
    if device.type == "cuda":
        report["peak_memory_gib"] = peak_memory
        print(f"peak memory: {report['peak_memory_gib']:.1f} GiB")

    if args.data or plan.text == "words":
        def on_batch(batch):
            objective.mu = losses.mu_of_length(batch.x0.shape[2] * batch.x0.shape[3] // size["patch"] ** 2)
            step(batch.x0, batch.c, batch.null, None, batch.is_null, batch.draws, 1.0, False)

        report["real_data"] = real = on_real_data(args, size, on_batch, device)
        print(f"on {' '.join(real['data'])}, {real['steps']} steps of {real['picture_sizes']} picture size{'s' * (real['picture_sizes'] > 1)}: "
              f"{B * real['steps'] / real['seconds']:.1f} images/s, {real['waited'] / real['seconds']:.1%} of the time waiting for data; "
              f"{real['compiled_in_warm_up']} pieces of code compiled in the warm-up, {real['compiled_after']} after it")  # fmt: skip
    else:
        print("data wait: not measured without --data")

    del ema, net, objective, adam
    other = diffusers_flux(size, device)
    if other is None:
        print("diffusers is not installed: no comparison with its FluxTransformer2DModel")
    else:
        flux, call = other
        if args.compile:
            for block in [*flux.transformer_blocks, *flux.single_transformer_blocks]:
                block.compile(dynamic=False)
        t = torch.rand(B, device=device)
        tokens = torch.randn(B, image_tokens, size["channels"] * size["patch"] ** 2, device=device)

        def ours():
            network(x0, t, t, *c).square().mean().backward()
            network.zero_grad(set_to_none=True)

        def theirs():
            call(tokens, t, *c, precision).float().square().mean().backward()
            flux.zero_grad(set_to_none=True)

        pair = in_turns({"ours": ours, "diffusers": theirs}, device, args.repeats)
        report["forward_backward"] = pair
        print(f"forward + backward: {pair['ours'] * 1e3:.1f} ms, diffusers' FluxTransformer2DModel {pair['diffusers'] * 1e3:.1f} ms "
              f"({pair['ours'] / pair['diffusers']:.2f} of it)")  # fmt: skip
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
