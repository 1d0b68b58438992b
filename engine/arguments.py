"""The flags of train.py, the recipe they make, and what config.json keeps of both.

args = arguments.parse()                # with --resume, flags that are not given come from the run that goes on
plan = arguments.plan_of(args)          # recipe.py's, with what the flags change
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import data
import emoji
import encoders
import files
import objectives
import recipe
from engine import checkpoint, errors, machine, optimizers
from engine.processes import Ranks
from model import SIZES
from objectives import OBJECTIVES, VARIANTS

# What a run keeps for its whole life, and what changes the recipe.
RECIPE = ("steps", "batch_size", "lr", "side", "text", "txt_len", "autoencoder")
RECIPE += ("micro_batch", "wrong_captions", "optimizer")
FIXED = ("size", "objective", *objectives.FLAGS, "text", "txt_len", "autoencoder", "wrong_captions")
FIXED += ("optimizer", "init", "seed", "caption_key", "side", "batch_size")
OF_A_CALL = ("out", "resume", "device", "dry_run", "patience")
# The least and the most of numbers: what becomes memory has a bound, so that a slip of the keyboard ends in a line.
RANGES = dict.fromkeys(("steps", "log_every"), (1, 10**9))
RANGES |= dict.fromkeys(("grid_every", "save_every", "milestone_every"), (0, 10**9))
RANGES |= dict.fromkeys(("batch_size", "micro_batch"), (2, 2**20))
RANGES |= dict.fromkeys(("keep", "patience"), (1, 10**6))
RANGES |= {"side": (1, 2**13), "txt_len": (1, 2**12), "workers": (1, 1024), "recompute": (0, 10**6)}
RANGES |= {"seed": (0, 2**63 - 1), "lr": (1e-30, 1), "wrong_captions": (0, 1)}
RANGES |= {name: flag["range"] for name, flag in objectives.FLAGS.items() if "range" in flag}


# ------------------------------------------------------------------------------------------------------------
# The flags
# ------------------------------------------------------------------------------------------------------------
def the_run(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the run").add_argument
    sources = f"{', '.join((*data.SETS, *emoji.SETS))}, a folder of pictures or of tars, tars, caches"
    wrong = "share of samples with the caption of another; 0 is off"
    a("--size", default="laptop", choices=list(SIZES), help="model and recipe")
    a("--data", metavar="DIR", type=errors.name, nargs="+", action="extend", help=sources)
    a("--caption-key", metavar="NAME", help=files.KEY_HELP)
    a("--wrong-captions", metavar="X", type=float, default=0.0, help=wrong)
    a("--out", metavar="DIR", type=errors.name, default="runs/laptop", help="folder of the run")
    a("--init", metavar="DIR", type=errors.model, help="begin with the weights of another run or checkpoint")
    a("--resume", action="store_true", help="go on from the last state in --out, with its flags")
    a("--dry-run", action="store_true", help="print the plan, memory and price of the run and end")
    a("--index", metavar="DIR", type=errors.name, help="folder of the index of tars (default: beside them)")
    a("--seed", metavar="N", type=int, default=0, help="of everything random")


def the_recipe(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the recipe").add_argument
    optimizer = "adam (S.2), or muon for the blocks' matrices"
    a("--steps", metavar="N", type=int, help="iterations")
    a("--batch-size", metavar="N", type=int, help="pictures an iteration, over all processes")
    a("--lr", metavar="X", type=float, help="peak learning rate")
    a("--optimizer", default="adam", choices=list(optimizers.OPTIMIZERS), help=optimizer)
    a("--side", metavar="N", type=int, help="side of the pictures in pixels, in all stages")
    a("--text", metavar="SPEC", help="frozen text encoder, see encoders.py")
    a("--txt-len", metavar="N", type=int, help="tokens that a caption is cut or padded to")
    a("--autoencoder", metavar="SPEC", help="frozen auto-encoder, see encoders.py")


def the_objective(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the objective (Sec. 3.3, Table 2)").add_argument
    names = ", ".join(name for name in OBJECTIVES if name not in VARIANTS)
    a("--objective", metavar="NAME", default="self_e", choices=list(OBJECTIVES), help=names)
    for name, flag in objectives.FLAGS.items():
        number = {} if "choices" in flag else {"metavar": "X", "type": float}
        a(f"--{name.replace('_', '-')}", **number | {key: flag[key] for key in flag if key != "range"})


def the_machine(parser: argparse.ArgumentParser) -> None:
    a = parser.add_argument_group("the machine").add_argument
    precision = "inside the network (auto: the faster; fp32 where an objective takes finite differences)"
    yes_or_no = argparse.BooleanOptionalAction
    a("--device", metavar="NAME", default="auto", help="cuda, mps, cpu (auto: the best there is)")
    a("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=precision)
    a("--compile", action=yes_or_no, help="torch.compile each block (default: where it works and pays)")
    a("--micro-batch", metavar="N", type=int, help="pictures a process computes at once, at the first side")
    a("--recompute", metavar="N", type=int, default=0, help="blocks that recompute their activations")
    a("--zero", action=yes_or_no, default=False, help="spread Adam's moments over the processes (ZeRO-1)")
    a("--workers", metavar="N", type=int, default=1, help="threads that read data ahead")
    a("--patience", metavar="N", type=int, default=300, help="seconds to wait for the other processes")
    a = parser.add_argument_group("what is written").add_argument
    grids = "iterations between picture grids; 0 is off (default: ten a run, and an early one)"
    saves = "iterations between states; 0 is only at the end (default: five a run, every half hour)"
    a("--log-every", metavar="N", type=int, default=20, help="iterations between lines of metrics.jsonl")
    a("--grid-every", metavar="N", type=int, help=grids)
    a("--save-every", metavar="N", type=int, help=saves)
    a("--keep", metavar="N", type=int, default=2, help="newest states to keep")
    a("--milestone-every", metavar="N", type=int, default=0, help="keep multiples of N for good; 0 is off")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; with --resume, those not given are taken from the run that goes on. Raises UserError."""
    what = "Train Self-E. What has no default here has it in recipe.py, by --size."
    parser = errors.Parser("train.py", what)
    for table in (the_run, the_recipe, the_objective, the_machine):
        table(parser)
    args = parser.parse_args(argv)
    if args.resume:
        saved = checkpoint.read_config(Path(args.out)).get("arguments")
        if not isinstance(saved, dict):
            raise errors.UserError(f"{args.out}/config.json is not that of a run that train.py began")
        parser.set_defaults(**saved)
        begun = parser.parse_args(["--out", args.out])
        if args.data:  # in the place of the run's own, not beside them
            parser.set_defaults(data=None)
        args = parser.parse_args(argv)
        for name in FIXED:
            now, then = (value_of(a, name) for a in (args, begun))
            if now != then:
                raise errors.UserError(
                    f"{args.out} was begun with {flag_of(name)} {then}, not {now}: leave that out, or begin a new run "
                    f"with these weights (--init {args.out} --out NEW)"
                )
    elif args.init:
        take_from_init(args)
    check(parser, args)
    return args


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def value_of(args: argparse.Namespace, name: str):
    """What a flag means for a run, where it is not given too."""
    plan = plan_of(args)
    if name == "side":
        return " ".join(str(side) for stage in plan.stages for side in stage.sides)
    if name == "batch_size":
        return " ".join(str(stage.batch_size) for stage in plan.stages)
    return getattr(plan if name in RECIPE else args, name)


def take_from_init(args: argparse.Namespace) -> None:
    """A new run has the side, text length and encoders of the weights that it begins with, unless others are given."""
    config, keys = checkpoint.read_config(args.init), {"txt_len": "txt_len", "text": "text_encoder"}
    keys |= {"autoencoder": "autoencoder"}
    if len(recipe.RECIPES[args.size].stages[-1].sides) == 1:  # a recipe of several sides keeps them
        keys |= {"side": "side"}
    taken = {name: config[key] for name, key in keys.items() if getattr(args, name) is None}
    vars(args).update(taken)
    if taken and Ranks.of_environment().is_first:
        flags = [f"{flag_of(name)} {value}" for name, value in taken.items()]
        print(f"from {args.init}: its weights, and {' '.join(flags)}")


def check(parser: errors.Parser, args: argparse.Namespace) -> None:
    """Raise UserError for a number out of its range, or for flags that do not go together."""
    parser.check_ranges(args, **RANGES)
    if args.zero and args.optimizer == "muon":
        parser.error("--zero spreads the moments of Adam; it does not go with --optimizer muon")
    if args.derivative == "forward":
        if args.compile:
            parser.error("--derivative forward does not compile: leave out --compile")
        args.compile = False
    objective = OBJECTIVES[args.objective]
    if objective.derives and args.derivative == "difference" and args.precision == "bf16":
        parser.error("a finite difference drowns in bf16: --precision fp32, or --derivative forward")
    changed = [name for name, flag in objectives.FLAGS.items() if getattr(args, name) != flag["default"]]
    for name in changed:
        if name not in objective.flags and (name, args.aux_from) != ("aux_from", 1):
            others = [other for other, it in OBJECTIVES.items() if name in it.flags and other not in VARIANTS]
            parser.error(f"{flag_of(name)} is for {' and '.join(others)}; {args.objective} has none of it")
    if "k" in changed and not plan_of(args).aux_from < 1:
        parser.error("--k weighs the auxiliary term, which never joins here: give --aux-from too")


# ------------------------------------------------------------------------------------------------------------
# What follows from them
# ------------------------------------------------------------------------------------------------------------
def plan_of(args: argparse.Namespace) -> recipe.Recipe:
    """The recipe of --size with what the flags change."""
    objective = OBJECTIVES[args.objective]
    changes = {name: getattr(args, name) for name in RECIPE} | {"group": objective.group}
    if args.train_guidance != 1:  # guidance is in the target: none at sampling
        changes["guidance"] = 1.0
    aux_from = args.aux_from if "aux_from" in objective.flags else 1.0  # the others have no auxiliary term
    return recipe.make(args.size, data=args.data and tuple(args.data), aux_from=aux_from, **changes)


def sizes_of(args: argparse.Namespace) -> dict:
    """The entries of model.SIZES of a run, as JSON has them, and the time features that its objective needs."""
    factor = OBJECTIVES[args.objective].time_factor
    others = {"time_factor": factor} if factor != 1000 else {}  # FLUX's is Denoiser's own
    return SIZES[args.size] | {"axes": list(SIZES[args.size]["axes"])} | others


def precision_of(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> torch.dtype:
    """What --precision says; "auto" is measured once, and kept when the run is resumed. It is fp32 where the objective
    takes a finite difference, which bf16 would drown in rounding."""
    if args.precision != "auto":
        return checkpoint.DTYPES[args.precision]
    if args.resume:
        return getattr(torch, checkpoint.read_config(Path(args.out))["precision"])
    if OBJECTIVES[args.objective].derives and args.derivative == "difference":
        return torch.float32
    return ranks.gather(machine.pick_precision(device) if ranks.is_first else None)[0]


def config_of(args: argparse.Namespace, plan: recipe.Recipe, sizes: dict, precision, device) -> dict:
    """What config.json says of a run, but for the size of its pictures: what sampling needs, and how it was made."""
    arguments = {name: value for name, value in vars(args).items() if name not in OF_A_CALL}
    if args.data:  # a run may be resumed from another folder
        full = [os.path.abspath(name) if os.path.exists(name) or "{" in name else name for name in args.data]
        arguments["data"] = full
    if args.init:
        arguments["init"] = str(args.init)
    return {
        "format": 1,
        "size": args.size,
        "model": sizes,
        "objective": args.objective,
        **{name: getattr(args, name) for name in objectives.FLAGS if name != "aux_from"},
        "aux_from": plan.aux_from,
        "text_encoder": encoders.canonical(plan.text),
        "txt_len": plan.txt_len,
        "autoencoder": encoders.canonical(plan.autoencoder),
        "data": list(plan.data),
        "wrong_captions": plan.wrong_captions,
        "s_rule": OBJECTIVES[args.objective].s_rules[0],  # Sec. 3.4
        "eta": 1.0,  # S.2
        "guidance": plan.guidance,
        "guidance_space": "v",
        "t_max": plan.t_max,
        "steps": plan.steps,
        "batch_size": plan.stages[0].batch_size,
        "lr": plan.lr,
        "seed": args.seed,
        "optimizer": plan.optimizer,
        "precision": str(precision).removeprefix("torch."),
        "machine": machine.describe(device),
        "command": " ".join(["python train.py", *sys.argv[1:]]),
        "arguments": arguments,
    }
