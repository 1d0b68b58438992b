"""Errors that the user can fix: one clear line on stderr, exit code 2.

    raise errors.UserError("no such folder: pictures/")
    parser = errors.Parser("train.py", "Train Self-E.")
    errors.run(main)

Programs raise UserError at their edges, where arguments and files come in; every other exception is a defect of ours
and keeps its traceback.
"""

import argparse
import sys
from collections.abc import Callable

import torch


class UserError(ValueError):
    """Something that the user can fix; the message says what is wrong and what to do, in one line."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, and whose help fits a screen."""

    def __init__(self, program: str, description: str):
        super().__init__(prog=program, description=description, usage=f"python {program} [options]",
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=128))

    def error(self, message: str):
        raise UserError(message)


def run(main: Callable[[], None], stopped: str = "") -> None:
    """Run a program's main function; a UserError, a failing file operation or a full device becomes one line and exit
    code 2.

    With `stopped`, which says what a Ctrl-C leaves, that ends in this line and exit code 130.
    """
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if not stopped:
            raise
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
