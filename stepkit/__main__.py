"""The command line: ``python -m stepkit``, or ``stepkit``."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="stepkit", description="A paper that runs.")
    top.add_argument("--version", action="version", version=f"stepkit {version('stepkit')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "execute the notebooks in order, and bind what they show in one page"
    reproduce = commands.add_parser("reproduce", help=text, description=text)
    add = reproduce.add_argument
    add(
        "--profile",
        default="quick",
        metavar="NAME",
        help="quick: the notebooks' own defaults (the default); another: params/NAME.yaml",
    )
    add(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NN",
        help="only these notebooks, by number or name",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="parameters of the notebooks; values as in YAML",
    )
    add("--data", type=Path, metavar="DIR", help="where the videos of the profile are")
    add("--out", type=Path, metavar="DIR", help="where the run goes (default: runs, in the clone)")
    add(
        "--store",
        action="store_true",
        help="afterwards keep what was made: figures/, results/, the outputs in the notebooks",
    )
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status (2: the command cannot be carried out)."""
    options = vars(parser().parse_args(arguments))
    options.pop("command")
    from stepkit.reproduce import reproduce

    try:
        return reproduce(**options)
    except ValueError as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
