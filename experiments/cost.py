"""What a training step of each objective costs: time, evaluations, memory, all relative to flow matching.

    python experiments/cost.py                          # the laptop model on this machine, nothing else running
    python experiments/cost.py --out results/cost.json  # and as JSON
    python experiments/cost.py --objectives tim meanflow

Steps are taken in turns, so that the machine's moods hit all alike; the median counts. "Forward passes" are counted, a
backward pass as two. Memory is what autograd keeps for the backward pass, counted tensor by tensor, each once; on CUDA
the peak is measured too. Guided means --train-guidance 2, the target of training, not the sampler.
"""

import copy
import sys
from pathlib import Path

if (
    __name__ == "__main__"
):  # started as a file: modules are found from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import model
import recipe
from engine import arguments, benchmark, checkpoint, errors, machine
from objectives import OBJECTIVES

# label -> (objective, flags of train.py, whether the auxiliary term is on)
KINDS = {
    "flow matching": ("flow_matching", [], False),
    "Self-E": ("self_e", [], False),
    "Self-E, auxiliary stage": ("self_e", [], True),
    "IMM": ("imm", [], False),
    "shortcut": ("shortcut", [], False),
    "shortcut, guided": ("shortcut", ["--train-guidance", "2"], False),
    "MeanFlow": ("meanflow", [], False),
    "MeanFlow, guided": ("meanflow", ["--train-guidance", "2"], False),
    "MeanFlow, forward-mode": ("meanflow", ["--derivative", "forward"], False),
    "improved MeanFlow": ("improved_meanflow", [], False),
    "improved MeanFlow, guided": ("improved_meanflow", ["--train-guidance", "2"], False),
    "TiM": ("tim", [], False),
    "TiM, guided": ("tim", ["--train-guidance", "2"], False),
}


class Step:
    """Forward and backward pass of one kind on made-up pictures and prompts, tau = 1."""

    def __init__(self, kind: tuple, setting: benchmark.Setting, network, ema):
        name, flags, aux = kind
        objective = OBJECTIVES[name]
        self.network, self.ema = network, ema
        self.module = objective.build(network, ema, arguments.parse(["--objective", name, *flags]))
        draws = objective.draw(0, 0, list(range(setting.batch)), setting.latents, device=setting.device)
        self.inputs = (*benchmark.made_up_batch(setting), draws, 1.0, aux)

    def __call__(self) -> None:
        self.module(*self.inputs)[0].backward()
        self.network.zero_grad(set_to_none=False)

    def forward_passes(self) -> float:
        """Of the whole batch: 3 where the gradient passes through, 1 elsewhere."""
        rows = []

        def count(_, x):
            rows.append(len(x[0]) * (3 if torch.is_grad_enabled() else 1))

        hooks = [net.register_forward_pre_hook(count) for net in (self.network, self.ema)]
        self()
        for hook in hooks:
            hook.remove()
        return sum(rows) / len(self.inputs[0])

    def kept_bytes(self) -> int:
        """What the forward pass keeps for the backward pass."""
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = self.module(*self.inputs)[0]
        loss.backward()
        self.network.zero_grad(set_to_none=False)
        weights = {p.untyped_storage().data_ptr() for p in self.network.parameters()}
        return sum(size for place, size in kept.items() if place not in weights)


def measure(chosen: dict, setting: benchmark.Setting, repeats: int) -> dict:
    """label -> seconds, its ratio to flow matching's, forward passes, bytes kept."""
    network = model.Denoiser(**setting.size, precision=setting.precision).to(setting.device)
    network.recompute = setting.recompute
    ema = copy.deepcopy(network).requires_grad_(False)
    steps = {label: Step(kind, setting, network, ema) for label, kind in chosen.items()}
    counted = {
        label: {"forward_passes": step.forward_passes(), "kept_mib": step.kept_bytes() / 2**20}
        for label, step in steps.items()
    }
    medians = benchmark.in_turns(steps, setting.device, repeats)
    rows = {
        label: {"seconds": medians[label], "ratio": medians[label] / medians["flow matching"]}
        | counted[label]
        for label in steps
    }
    if setting.device.type == "cuda":
        for label, step in steps.items():
            torch.cuda.reset_peak_memory_stats(setting.device)
            step()
            rows[label]["peak_mib"] = torch.cuda.max_memory_allocated(setting.device) / 2**20
    return rows


def parse_arguments():
    parser = errors.Parser("experiments/cost.py", "What a training step of each objective costs.")
    a = parser.add_argument
    a("--size", default="laptop", choices=list(model.SIZES), help="which model (default: laptop)")
    a("--batch", metavar="N", type=int, default=32, help="pictures a step, a multiple of 8 (default: 32)")
    a(
        "--objectives",
        metavar="NAME",
        nargs="+",
        choices=list(OBJECTIVES),
        default=list(OBJECTIVES),
        help="beside flow matching (default: all)",
    )
    a(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="inside the network (default: the faster)",
    )
    a("--repeats", metavar="N", type=int, default=15, help="measured rounds (default: 15)")
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (default: the best there is)")
    a("--out", metavar="FILE", type=errors.file_to_write, help="write the figures as JSON")
    args = parser.parse_args()
    parser.check_ranges(args, batch=(8, 2**20), repeats=(1, 10**6))
    if args.batch % 8:
        parser.error("--batch must be a multiple of 8")
    return args


def main() -> None:
    args = parse_arguments()
    machine.keep_freed_memory()
    device, plan, size = machine.pick_device(args.device), recipe.RECIPES[args.size], model.SIZES[args.size]
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.precision) or machine.pick_precision(
        device
    )
    side = plan.stages[0].sides[0] // plan.factor()
    setting = benchmark.Setting(
        device,
        precision,
        size,
        args.batch,
        (size["channels"], side, side),
        (side // size["patch"]) ** 2,
        plan.txt_len,
        compile=False,
        recompute=0,
    )
    torch.manual_seed(0)
    chosen = {label: kind for label, kind in KINDS.items() if kind[0] in (*args.objectives, "flow_matching")}
    rows = measure(chosen, setting, args.repeats)
    print(f"{'objective':28}{'ms':>9}{'x flow matching':>17}{'forward passes':>16}{'kept, MiB':>11}")
    for label, row in rows.items():
        print(
            f"{label:28}{row['seconds'] * 1e3:9.1f}{row['ratio']:17.2f}{row['forward_passes']:16.2f}"
            f"{row['kept_mib']:11.1f}"
        )
    if args.out:
        checkpoint.write_json(
            args.out,
            machine.provenance(device)
            | {
                "size": args.size,
                "batch": args.batch,
                "precision": str(precision).removeprefix("torch."),
                "compiled": False,
                "repeats": args.repeats,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    errors.run(main)
