"""Errors that the user can fix: one clear line on stderr, exit code 2.

    raise errors.UserError("no such folder: pictures/")
    content = errors.regular(path).read_bytes()      # no pipe, no device: these would be waited for
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
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class UserError(ValueError):
    """Something that the user can fix; the message says what is wrong and what to do, in one line."""


def shortened(text: str, longest: int = 80) -> str:
    """A text with the middle left out of every word that is longer."""
    return re.sub(
        r"\S{%d,}" % (longest + 1), lambda word: f"{word[0][: longest // 2]}...{word[0][-10:]}", text
    )


def regular(path: Path, kind: type[UserError] = UserError) -> Path:
    """The path, unless what lies there is a pipe, a socket or a device, which would be waited for: raises `kind` then.

    A path where nothing lies passes; opening it says so.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise kind(f"{path} is not a regular file: put one in its place")
    return path


def whole_number(text: str) -> int:
    """The type of whole-number flags: below 2^63, because what is larger is a slip, and overflows further on."""
    value = int(text)
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError("must be a whole number below 2^63")
    return value


def name(text: str) -> str:
    """The type of flags that name a file, folder or data set: an empty one would mean the folder we are in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def file_to_write(text: str) -> Path:
    """The type of flags that name a file to write: what cannot be one is refused now, not after the work."""
    path = Path(name(text))
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists, not {text}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"names a file in a folder that cannot be written to: {text}")
    return path


class Help(argparse.HelpFormatter):
    """Every flag says its default, where it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=128)

    def _get_help_string(self, action) -> str:
        said = action.default in (None, False, argparse.SUPPRESS) or "(default" in action.help
        return action.help if said else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, whose whole numbers have an end, whose paths are not empty, and
    whose help fits a screen."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program, description=description, usage=f"python {program} [options]", formatter_class=Help
        )
        self.register("type", int, whole_number)
        self.register("type", Path, lambda text: Path(name(text)))

    def error(self, message: str):
        raise UserError(shortened(message, 200))

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


class Screen:
    """A text stream whose writes are lost, without an error, once nobody reads it: a closed terminal, an ended `tee`.

    For messages of a program whose work goes on, or is saved, without them.
    """

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


def end_output() -> None:
    """Leave nothing to be printed at the interpreter's end, where a full disk or a closed pipe would be told again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is full: no defect of ours, and no damage of a file."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run a program's main function; a UserError, a failing file operation or a full memory becomes one line and exit
    code 2.

    A Ctrl-C ends in the line `stopped`, which says what it leaves, and exit code 130. Letters that the terminal does
    not have are printed as their codes.
    """
    # A stream that was closed before the start (daemons, `>&-`) is None, and whatever is written to it is lost.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):  # not where a test has put something else in its place
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except (
        UserError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError
        full = out_of_memory(error)
        if isinstance(error, RuntimeError) and not full:
            raise  # a defect of ours
        said = ("out of memory: " if full else "") + (str(error) or "ask for less at once")
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {' '.join(said.split())}", file=Screen(sys.stderr))
        end_output()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=Screen(sys.stderr))
        sys.exit(130)
