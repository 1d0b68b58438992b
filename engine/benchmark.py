"""How fast a training step is here, and what it spends its time on (S.2; every figure measured in one run).

    python engine/benchmark.py                                       # the laptop model on this machine
    python engine/benchmark.py --size 0.5b --blocks 1 1 --batch 4    # one double and one single block of the 0.5B model
    python engine/benchmark.py --size 2b --batch 16                  # on a GPU

Prints and, with --out, writes as JSON: the steps of flow matching, Self-E (tau = 1) and Self-E with the auxiliary term,
taken in turns so that the machine's moods hit all alike; forward + backward beside diffusers' FluxTransformer2DModel of
the same size; the optimizer's and the average's share; how long the loop waits for data, and what torch.compile still
compiles after its warm-up over all picture sizes of the data; and the share of the machine's own matrix-product peak
(MFU), with the operations counted by `model.forward_flops`, a backward pass as two forward passes and no credit for
recomputation.
"""

import copy
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters
from torch.optim.swa_utils import get_ema_multi_avg_fn

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import data
import emoji
import losses
import model
import recipe
from engine import checkpoint, errors, limits, machine, preparation
from engine.feed import Feed, Reading
from objectives import AUX_FORWARDS, OBJECTIVES

# The steps compared, and their forward-pass equivalents per picture.
FORWARDS = {
    "flow matching": OBJECTIVES["flow_matching"].forwards,
    "Self-E": OBJECTIVES["self_e"].forwards,
    "Self-E + aux": AUX_FORWARDS,
}


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


# ------------------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------------------
class Setting(NamedTuple):
    """What the command line settles."""

    device: torch.device
    precision: torch.dtype
    size: dict  # of model.SIZES, with --blocks
    batch: int
    latents: tuple[int, int, int]  # shape of one sample as the network sees it
    image_tokens: int
    text_tokens: int
    compile: bool
    recompute: int


class Step:
    """A training step as train.py makes it: the objective, Adam and the average."""

    def __init__(self, setting: Setting):
        with setting.device:  # drawn where it runs: two billion numbers take a processor half a minute
            self.network = model.Denoiser(**setting.size, precision=setting.precision)
        self.network.recompute = setting.recompute
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        if setting.compile:
            machine.allow_shapes(64)
            self.network.compile_blocks()
            self.ema.compile_blocks()
        self.objective = losses.SelfE(self.network, self.ema, mu=losses.mu_of_length(setting.image_tokens))
        self.adam = torch.optim.Adam(
            self.network.parameters(), lr=1e-4, betas=recipe.Recipe.betas, fused=True
        )
        self.average = get_ema_multi_avg_fn(0.9999)

    def update(self) -> None:
        self.adam.step()
        self.average(list(self.ema.parameters()), list(self.network.parameters()), 0)

    def __call__(self, *inputs) -> None:
        self.objective(*inputs)[0].backward()
        self.update()
        self.adam.zero_grad(set_to_none=False)


def made_up_batch(setting: Setting) -> tuple:
    """x0, c, null, fake and is_null as an objective takes them: noise in place of pictures and prompts."""
    B, device = setting.batch, setting.device
    x0 = torch.randn(B, *setting.latents, device=device)
    c, null, fake = (
        (
            torch.randn(B, setting.text_tokens, setting.size["txt_dim"], device=device),
            torch.randn(B, setting.size["vec_dim"], device=device),
        )
        for _ in range(3)
    )
    return x0, c, null, fake, torch.zeros(B, dtype=torch.bool, device=device)


def made_up_inputs(setting: Setting) -> dict[str, tuple]:
    """The arguments of losses.SelfE for each kind of step on one made-up batch, tau = 1."""
    batch, index = made_up_batch(setting), list(range(setting.batch))
    draws = {p: losses.draw(0, 0, index, setting.latents, p, setting.device) for p in (0.5, 1.0)}
    return {
        "flow matching": (*batch, draws[1.0], 1.0, False),
        "Self-E": (*batch, draws[0.5], 1.0, False),
        "Self-E + aux": (*batch, draws[0.5], 1.0, True),
    }


def count_forwards(step: Step, inputs: dict[str, tuple], batch: int) -> dict[str, float]:
    """Forward passes of each kind of step, in units of the whole batch."""
    calls, forwards = [], {}
    hooks = [
        net.register_forward_pre_hook(lambda _, x: calls.append(len(x[0]) / batch))
        for net in (step.network, step.ema)
    ]
    for name, arguments in inputs.items():
        calls.clear()
        step(*arguments)
        forwards[name] = sum(calls)
    for hook in hooks:
        hook.remove()
    return forwards


def measure_steps(setting: Setting, step: Step, repeats: int) -> dict:
    """The kinds of step, and the parts of a Self-E step, in turns; then the machine's matrix-product peak."""
    device, inputs = setting.device, made_up_inputs(setting)
    forwards = count_forwards(step, inputs, setting.batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    works = {name: functools.partial(step, *arguments) for name, arguments in inputs.items()}
    parts = {
        "forward": lambda: step.objective(*inputs["Self-E"]),
        "forward + backward": lambda: step.objective(*inputs["Self-E"])[0].backward(),
        "Adam + EMA": step.update,
    }
    medians = in_turns(works | parts, device, repeats)
    step.adam.zero_grad(set_to_none=False)
    memory = {}
    if device.type == "cuda":
        # Before the large matrices of the peak
        memory = {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}

    peak = {"float32": 0.0, "bfloat16": 0.0}

    def measure_peak():  # between steps, so that both see the same machine, and the best of all rounds
        for name in peak:
            peak[name] = max(peak[name], machine.peak_flops(device, getattr(torch, name)))

    in_turns({"Self-E": works["Self-E"], "peak": measure_peak}, device, 5)
    flops = setting.batch * model.forward_flops(setting.size, setting.image_tokens, setting.text_tokens)
    used = str(setting.precision).removeprefix("torch.")
    rows = {}
    for name in works:
        t = medians[name]
        rate = FORWARDS[name] * flops / t
        rows[name] = {
            "seconds": t,
            "images_per_s": setting.batch / t,
            "ratio": t / medians["flow matching"],
            "forwards": forwards[name],
            "tflops": rate / 1e12,
            "mfu": rate / peak[used],
        }
    return {
        "peak_tflops": {name: round(value / 1e12, 3) for name, value in peak.items()},
        "steps": rows,
        "adam_and_ema_share": medians["Adam + EMA"] / medians["Self-E"],
        "self_e_split_seconds": {
            "forward": medians["forward"],
            "backward": medians["forward + backward"] - medians["forward"],
            "Adam + EMA": medians["Adam + EMA"],
        },
    } | memory


def kernels(setting: Setting, step: Step, most: int = 20) -> list[dict]:
    """What one Self-E step computes, by torch's profiler: the `most` kernels (operators on a CPU) that take longest."""
    inputs, on_gpu = made_up_inputs(setting)["Self-E"], setting.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        step(*inputs)
        wait(setting.device)
    spent = {}
    for event in profile.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA):
            spent[event.key] = (own / 1e3, event.count)
    whole = sum(own for own, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:most]
    return [
        {"name": name[:120], "milliseconds": own, "share": own / whole, "calls": calls}
        for name, (own, calls) in longest
    ]


def on_real_data(args, setting: Setting, step: Step) -> dict:
    """Self-E steps on batches as training reads them: what the loop waits for, and what is compiled late.

    The first half of the steps is the warm-up, in which every picture size should be met; what is
    returned is of the second half, on pictures not read before, with one thread reading ahead as in train.py. Raises
    DataError or UserError when the data cannot be used with this model.
    """
    plan = recipe.make(
        args.size,
        data=args.data and tuple(args.data),
        batch_size=args.batch,
        side=args.side,
        txt_len=args.txt_len,
        micro_batch=args.batch,
        aux_from=1.0,
    )
    plan = dataclasses.replace(plan, steps=4 * args.repeats, stages=plan.stages[:1])
    size, device = setting.size, setting.device
    codec, sizes = preparation.open_encoders(plan, size, device, draws=False)
    if sizes != size:
        raise errors.UserError(f"{' '.join(plan.data)} gives {sizes}: not the sizes of --size {args.size}")
    feed = Feed(plan, OBJECTIVES["self_e"].draw, 0, codec, reading=Reading(workers=1))
    stats, met, half = counters["stats"], set(), plan.steps // 2
    graphs = [stats["unique_graphs"]]
    for number, batch in enumerate(feed.stream(0)):
        if number == half:
            graphs.append(stats["unique_graphs"])
            feed.waited, start = 0.0, time.perf_counter()
        met.add(tuple(batch.x0.shape[2:]))
        step.objective.mu = losses.mu_of_length(recipe.latent_tokens(size, batch.x0.shape))
        step(batch.x0, batch.c, batch.null, None, batch.is_null, batch.draws, 1.0, False)
        wait(device)  # as train.py does once an iteration
    return {
        "data": list(plan.data),
        "steps": half,
        "picture_sizes": len(met),
        "seconds": time.perf_counter() - start,
        "waited": feed.waited,
        "compiled_in_warm_up": graphs[1] - graphs[0],
        "compiled_after": stats["unique_graphs"] - graphs[1],
    }


def positions(setting: Setting) -> torch.Tensor:
    """(0, y, x) of each image token, row by row, as FLUX's own programs lay them out: [image tokens, 3]."""
    rows, cols = (n // setting.size["patch"] for n in setting.latents[1:])
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float().to(setting.device)


def diffusers_flux(setting: Setting):
    """diffusers' FluxTransformer2DModel of the same size, and how to call it
    with our inputs; None without diffusers."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        return None
    size, device = setting.size, setting.device
    values = size["channels"] * size["patch"] ** 2
    with device:
        flux = FluxTransformer2DModel(
            patch_size=1,
            in_channels=values,
            num_layers=size["double"],
            num_single_layers=size["single"],
            attention_head_dim=size["width"] // size["heads"],
            num_attention_heads=size["heads"],
            joint_attention_dim=size["txt_dim"],
            pooled_projection_dim=size["vec_dim"],
            guidance_embeds=False,
            axes_dims_rope=size["axes"],
        )
    img_ids, txt_ids = positions(setting), torch.zeros(setting.text_tokens, 3, device=device)

    def call(tokens, t, txt, vec):
        with torch.autocast(device.type, setting.precision, enabled=setting.precision != torch.float32):
            return flux(
                hidden_states=tokens,
                encoder_hidden_states=txt,
                pooled_projections=vec,
                timestep=t,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0]

    return flux, call


def against_diffusers(setting: Setting, network: model.Denoiser, repeats: int) -> dict | None:
    """Seconds of forward + backward of our network and of diffusers' of the
    same size, in turns; None without diffusers."""
    other = diffusers_flux(setting)
    if other is None:
        return None
    flux, call = other
    if setting.compile:
        for block in [*flux.transformer_blocks, *flux.single_transformer_blocks]:
            block.compile(dynamic=False)
    x, c, *_ = made_up_inputs(setting)["flow matching"]
    t = torch.rand(setting.batch, device=setting.device)
    tokens = torch.randn(
        setting.batch,
        setting.image_tokens,
        setting.size["channels"] * setting.size["patch"] ** 2,
        device=setting.device,
    )

    def ours():
        network(x, t, t, *c).square().mean().backward()
        network.zero_grad(set_to_none=True)

    def theirs():
        call(tokens, t, *c).float().square().mean().backward()
        flux.zero_grad(set_to_none=True)

    return in_turns({"ours": ours, "diffusers": theirs}, setting.device, repeats)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------
def parse_arguments():
    parser = errors.Parser("engine/benchmark.py", "Measure a training step on this machine.")
    a = parser.add_argument
    a("--size", default="laptop", choices=list(model.SIZES), help="which model (default: laptop)")
    a("--blocks", metavar="N", type=int, nargs=2, help="double and single blocks instead of the size's own")
    a("--batch", metavar="N", type=int, default=64, help="pictures a step, even (default: 64)")
    a("--side", metavar="N", type=int, help="side of the pictures in pixels (default: the recipe's)")
    a(
        "--data",
        metavar="DIR",
        type=errors.name,
        nargs="+",
        help="what training would read (default: one-shape for laptop, else not measured)",
    )
    a("--txt-len", metavar="N", type=int, help="text tokens (default: the recipe's)")
    a(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="inside the network (default: the faster)",
    )
    a("--compile", action="store_true", help="torch.compile each block")
    a(
        "--recompute",
        metavar="N",
        type=int,
        default=0,
        help="blocks that recompute their activations (default: 0)",
    )
    a("--repeats", metavar="N", type=int, default=7, help="measured rounds (default: 7)")
    a("--profile", action="store_true", help="also list the kernels of a Self-E step that take longest")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    ranges = {name: limits.RANGES[name] for name in ("side", "txt_len", "recompute")}
    parser.check_ranges(
        args, **ranges, batch=limits.RANGES["batch_size"], blocks=limits.MODEL["double"], repeats=(1, 10**6)
    )
    if args.batch % 2 or sum(args.blocks or [1]) < 1:
        parser.error("--batch must be even, and there must be a block")
    for name in args.data or []:  # now, not after the steps are measured
        if name not in (*data.SETS, *emoji.SETS) and not Path(name).is_dir():
            parser.error(f"--data: no such folder: {name}")
    plan = recipe.RECIPES[args.size]
    multiple = model.SIZES[args.size]["patch"] * plan.factor()
    if args.side is not None and (args.side < multiple or args.side % multiple):
        parser.error(f"--side must be a multiple of {multiple}")
    return args


def setting_of(args) -> Setting:
    plan, size = recipe.RECIPES[args.size], dict(model.SIZES[args.size])
    if args.blocks:
        size["double"], size["single"] = args.blocks
    device = machine.pick_device(args.device)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.precision) or machine.pick_precision(
        device
    )
    pixels = args.side or plan.stages[0].sides[0]
    side = pixels // plan.factor()
    return Setting(
        device,
        precision,
        size,
        args.batch,
        (size["channels"], side, side),
        recipe.image_tokens(size, pixels, plan.factor()),
        args.txt_len or plan.txt_len,
        args.compile,
        args.recompute,
    )


def print_steps(setting: Setting, args, report: dict) -> None:
    print(
        f"{args.size} ({setting.size['double']} + {setting.size['single']} blocks), batch {setting.batch}, "
        f"{setting.image_tokens} + "
        f"{setting.text_tokens} tokens, {report['precision']}{', compiled' if setting.compile else ''}, on "
        f"{report['hardware']}"
    )
    print(
        "matrix-product peak: "
        + ", ".join(f"{v:.2f} TFLOP/s in {k}" for k, v in report["peak_tflops"].items())
    )
    print(
        f"{'step':16}{'ms':>9}{'images/s':>10}{'x flow matching':>17}{'forward passes':>16}"
        f"{'TFLOP/s':>9}{'of peak':>9}"
    )
    for name, row in report["steps"].items():
        print(
            f"{name:16}{row['seconds'] * 1e3:9.1f}{row['images_per_s']:10.1f}{row['ratio']:17.3f}"
            f"{row['forwards']:16.1f}"
            f"{row['tflops']:9.3f}{row['mfu']:9.1%}"
        )
    print(
        "a Self-E step: "
        + ", ".join(f"{name} {t * 1e3:.1f} ms" for name, t in report["self_e_split_seconds"].items())
        + f" ({report['adam_and_ema_share']:.1%} of it)"
    )
    if "peak_memory_gib" in report:
        print(f"peak memory: {report['peak_memory_gib']:.1f} GiB")


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    setting = setting_of(args)
    torch.manual_seed(0)
    step = Step(setting)
    report = (
        machine.provenance(setting.device)
        | {
            "size": args.size,
            "blocks": [setting.size["double"], setting.size["single"]],
            "batch": setting.batch,
            "image_tokens": setting.image_tokens,
            "text_tokens": setting.text_tokens,
            "precision": str(setting.precision).removeprefix("torch."),
            "compiled": setting.compile,
            "recompute": setting.recompute,
        }
        | measure_steps(setting, step, args.repeats)
    )
    print_steps(setting, args, report)
    if args.profile:
        report["kernels"] = kernels(setting, step)
        for row in report["kernels"]:
            print(f"{row['milliseconds']:9.2f} ms {row['share']:6.1%} {row['calls']:5} x {row['name'][:80]}")

    if args.data or recipe.RECIPES[args.size].text == "words":
        report["real_data"] = real = on_real_data(args, setting, step)
        print(
            f"on {' '.join(real['data'])}, {real['steps']} steps of {real['picture_sizes']} picture "
            f"size{'s' * (real['picture_sizes'] > 1)}: "
            f"{setting.batch * real['steps'] / real['seconds']:.1f} images/s, {real['waited'] / real['seconds']:.1%} "
            "of the time waiting for data; "
            f"{real['compiled_in_warm_up']} pieces of code compiled in the warm-up, {real['compiled_after']} after "
            "it"
        )
    else:
        print("data wait: not measured without --data")

    network = step.network
    del step  # the average and Adam's moments make room for the other model
    pair = against_diffusers(setting, network, args.repeats)
    if pair is None:
        print("diffusers is not installed: no comparison with its FluxTransformer2DModel")
    else:
        report["forward_backward"] = pair
        print(
            f"forward + backward: {pair['ours'] * 1e3:.1f} ms, diffusers' FluxTransformer2DModel "
            f"{pair['diffusers'] * 1e3:.1f} ms "
            f"({pair['ours'] / pair['diffusers']:.2f} of it)"
        )
    if args.out:
        checkpoint.write_json(args.out, report)


if __name__ == "__main__":
    errors.run(main)
