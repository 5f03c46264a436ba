"""The `ptfix` command: one module per subcommand, each with `add_parser(subparsers)` and `run(args) -> int`.

Exit status: 0 good, 1 problem found, 2 wrong usage or unreadable input.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

import ptfix

_COMMANDS = ("demo", "doctor", "verify", "check", "repair", "bench", "report")


class UsageError(Exception):
    """Wrong usage or unreadable input, told in one clear sentence. Becomes exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
        status: int = importlib.import_module(f"{__name__}.{args.command}").run(args)
    except UsageError as error:
        print(f"ptfix: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # argparse has said what is wrong, or has printed the help
        return stop.code if isinstance(stop.code, int) else 0
    return status


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with only the asked-for command loaded where there is one."""
    parser = argparse.ArgumentParser(prog="ptfix", description="Fixes the seam of transformers and peft.")
    parser.add_argument("--version", action="version", version=f"ptfix {ptfix.__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    offered = [name for name in _COMMANDS if importlib.util.find_spec(f"{__name__}.{name}")]
    for name in [arguments[0]] if arguments and arguments[0] in offered else offered:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    return parser
