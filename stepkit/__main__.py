"""The command line: ``python -m stepkit``, or ``stepkit``."""

import argparse
import sys
from pathlib import Path

from stepkit import __version__


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="stepkit", description="A paper that runs.")
    top.add_argument("--version", action="version", version=f"stepkit {__version__}")
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
    _add_sweep(commands)
    return top


def _add_sweep(commands) -> None:
    text = "explain a dataset by some methods, on any number of workers; resumes"
    more = "stepkit.methods() lists methods and their options; docs/scale.md says more"
    add = commands.add_parser("sweep", help=text, description=text, epilog=more).add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where maps and manifest go")
    known = (
        "appearance, object, motion (generated), ucf101-24, epic-object, something-v2, or folder"
    )
    add("--dataset", default="folder", help=f"{known}: videos of your own (default)")
    add("--data", default="", metavar="DIR", help="where its videos are")
    add("--split", default="test", help="train, val, test or all (default: test)")
    add("--frames", type=int, default=16, metavar="T", help="of a clip (default: 16)")
    add("--size", type=int, default=112, metavar="PIXELS", help="height and width (default: 112)")
    add("--n", type=int, metavar="N", help="the first N clips (default: all; 120 generated ones)")
    models = "r2plus1d_18 (default), r50l, r2plus1d_narrow, r50l_narrow"
    add("--model", default="r2plus1d_18", help=models)
    add("--weights", required=True, metavar="FILE", help="its weights, .safetensors")
    kinds = "float32 (default), bfloat16, or auto: bfloat16 where the hardware is fast at it"
    add("--precision", default="float32", help=kinds)
    add("--method", nargs="+", default=["step"], help="ids of stepkit.methods (default: step)")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="options of the methods that have them; values as in YAML",
    )
    add(
        "--executor",
        default="loop",
        help="loop (default), threads, processes, dask, or tcp://host:port",
    )
    add("--workers", type=int, default=0, help="how many (default: one per core)")
    add("--threads", type=int, default=1, help="of torch, in each job (default: 1)")
    add("--batch-size", type=int, default=1, metavar="N", help="clips per job; more for a GPU")
    add("--retries", type=int, default=1, metavar="N", help="for jobs that failed (default: 1)")
    add("--seed", type=int, default=0, help="of methods that draw random numbers (default: 0)")


def sweep(options: dict) -> int:
    """Carry out ``stepkit sweep``; 0, or 1 if clips failed or it had to stop, 130 for Ctrl-C."""
    from concurrent.futures import BrokenExecutor

    from stepkit.scheduler import unwound
    from stepkit.sweep import asked, executor, run

    take = options.pop
    try:
        with unwound(), executor(take("executor"), take("workers")) as workers:
            table = run(**asked(**options), executor=workers, progress=True)
    except (BrokenExecutor, OSError) as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stepkit: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    counts = table["status"].where(table["what"] == "", table["what"]).value_counts()
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{(table['status'] == 'done').sum()} of {len(table)} done: {told}")
    failed = table[table["status"] == "failed"]
    for row in failed.head(20).itertuples():
        print(f"failed: {row.method}, {row.clip}: {row.error}", file=sys.stderr)
    return int(len(failed) > 0)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status (2: the command cannot be carried out)."""
    options = vars(parser().parse_args(arguments))
    try:
        if options.pop("command") == "sweep":
            return sweep(options)
        from stepkit.reproduce import reproduce

        return reproduce(**options)
    except ValueError as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
