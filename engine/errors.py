"""Errors that the user can fix: one clear line on stderr, exit code 2.

    raise errors.UserError("no such folder: pictures/")
    parser = errors.Parser("train.py", "Train Self-E.")
    parser.add_argument("--out", type=errors.file_to_write)
    parser.check_ranges(args, steps=(1, 10**6))
    errors.run(main)

Programs raise UserError at their edges, where arguments and files come in; every other exception is a defect of ours
and keeps its traceback.
"""

import argparse
import contextlib
import difflib
import functools
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch


class UserError(ValueError):
    """Something that the user can fix; the message says what is wrong and what to do, in one line."""


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------
def name(text: str) -> str:
    """The type of flags that name a file, folder or data set: an empty one would mean the folder we are in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def model(text: str) -> Path:
    """The type of flags that name the folder of a model, which its file of weights may stand for."""
    path = Path(name(text))
    return path.parent if path.name == "model.safetensors" else path


def file_to_write(text: str) -> Path:
    """The type of flags that name a file to write: what cannot be one is refused now, not after the work."""
    path = Path(name(text))
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists, not {text}")
    return path


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every flag says its default, where it has one."""

    def _get_help_string(self, action) -> str:
        silent = (
            action.default in (None, "") or action.default is False
        )  # 0 is a default, though it equals False
        if silent or "(default" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, and whose help fits a screen."""

    def __init__(self, program: str, description: str):
        usage, wide = f"python {program} [options]", functools.partial(Help, max_help_position=40, width=128)
        super().__init__(prog=program, description=description, usage=usage, formatter_class=wide)
        self.register("type", Path, lambda text: Path(name(text)))

    def error(self, message: str):
        raise UserError(textwrap.shorten(message, 500, placeholder=" ..."))

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, 1)
            self.error(f"there is no {word}" + (f"; did you mean {near[0]}?" if near else ""))
        return found

    def check_ranges(self, args: argparse.Namespace, **ranges: tuple[float, float]) -> None:
        """Complain about a number, or one of a list, that does not lie in its range; None passes."""
        for flag, (least, most) in ranges.items():
            value = getattr(args, flag)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not least <= number <= most:
                    self.error(f"--{flag.replace('_', '-')} must lie between {least} and {most}")


# ------------------------------------------------------------------------------------------------------------
# The end of a program
# ------------------------------------------------------------------------------------------------------------
class Screen:
    """A stream of messages whose writes are lost, without an error, once nobody reads it: a closed terminal, an ended
    `tee`. The work goes on, or is saved, without them."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is full: no defect of ours, and no damage of a file."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run a program's main function. A UserError, a failing file operation or a full memory becomes one line and exit
    code 2, Ctrl-C the line `stopped` and 130."""
    # A stream that was closed before the start (daemons, `>&-`) is None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stderr = Screen(sys.stderr)
    # Letters that the terminal does not have are printed as their codes
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if isinstance(error, RuntimeError) and not full:
            raise  # a defect of ours
        message = ("out of memory: " if full else "") + (str(error) or "ask for less at once")
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {' '.join(message.split())}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk or a closed pipe, which the interpreter would complain of again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
