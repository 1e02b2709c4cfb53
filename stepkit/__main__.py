"""The command line: ``python -m stepkit``, or ``stepkit``."""

import argparse
import sys
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from stepkit import __version__
from stepkit._checks import one_of, require
from stepkit._registry import bring
from stepkit._settings import read_settings
from stepkit.attribution import METHODS, PRESETS
from stepkit.data import load_dataset
from stepkit.reproduce import reproduce
from stepkit.sweep import ready, sweep

_SEVERAL = {"nargs": "+", "action": "extend", "default": []}
_SETTINGS = _SEVERAL | {"dest": "settings", "metavar": "KEY=VALUE"}
_REPRODUCE = {  # option: default, what it is
    "--profile": ("quick", "quick: the notebooks' own defaults; another: params/NAME.yaml"),
    "--data": (None, "folder of the videos of the profile"),
    "--out": (None, "folder of the run (None: runs, in the clone)"),
}
_SWEEP = {
    "--dataset": ("folder", "folder: videos of your own; or another name that load_dataset knows"),
    "--data": ("", "folder of its videos"),
    "--split": ("test", "train, val, test or all"),
    "--frames": (16, "of a clip"),
    "--size": (112, "height and width, pixels"),
    "--n": (0, "so many clips, of all classes in turn (0: all; 120 generated ones)"),
    "--model": ("r2plus1d_18", "a name that load_model knows, or package.module:function"),
    "--weights": ("", "of the model: a .safetensors file, or torchvision's KINETICS400_V1, ..."),
    "--precision": ("float32", "float32, bfloat16, or auto: bfloat16 where it is fast"),
    "--preset": ("", "of STEP: default, printed, released, fast"),
    "--extra": ("", "package.module whose methods and datasets are known by name"),
    "--executor": ("loop", "loop, threads, processes, dask, or tcp://host:port"),
    "--workers": (0, "how many (0: one per core)"),
    "--threads": (1, "of torch, in each job"),
    "--batch-size": (1, "clips per job; more for a GPU"),
    "--retries": (1, "for jobs that failed"),
    "--seed": (0, "of methods that draw random numbers"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="stepkit", description="A paper that runs.")
    top.add_argument("--version", action="version", version=f"stepkit {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "execute the notebooks in order, and bind what they show in one page"
    add = _command(commands, "reproduce", text, _REPRODUCE)
    add("--only", **_SEVERAL, metavar="NN", help="only these notebooks, by number or name")
    add("--set", **_SETTINGS, help="parameters of the notebooks; values as in YAML")
    text = "explain a dataset by some methods, on any number of workers; resumes"
    add = _command(commands, "sweep", text, _SWEEP)
    add("--out", required=True, help="folder of maps and manifest")
    add("--method", nargs="+", default=["step"], help="ids of stepkit.methods()")
    add("--set", **_SETTINGS, help="options of the methods that have them; values as in YAML")
    return top


def _command(commands, name: str, text: str, options: dict):
    """Add a command with options that have one value each; return what adds more."""
    form = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser(name, help=text, description=text, formatter_class=form)
    for option, (default, told) in options.items():
        kind = Path if default is None else type(default)
        command.add_argument(option, default=default, type=kind, help=told)
    return command.add_argument


def _sweep(**given) -> int:
    """Carry out ``stepkit sweep``; 0, or 1 if clips failed or it had to stop, 130 for Ctrl-C."""
    take = given.pop
    clips = {name: take(name) for name in ("frames", "size", "data", "extra")}
    bring(clips["extra"])
    settings, preset = read_settings(take("settings")), take("preset")
    if preset:
        one_of("--preset", preset, PRESETS)
        settings["preset"] = preset
    methods = _options(take("method"), settings)
    n, model, weights = take("n") or None, take("model"), take("weights")
    source = partial(load_dataset, take("dataset"), take("split"), n=n or 120, **clips)
    expected = "a .safetensors file or a name of torchvision's: an untrained one explains nothing"
    require(bool(weights) or ":" in model, "--weights", "none", expected)
    network = partial(ready, model, len(source().classes), weights, take("precision"))
    network()  # a wrong name or file is refused here, not by every job
    given |= {"model_name": model.replace(":", "."), "n": n, "progress": True}
    try:
        return _told(sweep(source, network, methods, **given))
    except (BrokenExecutor, OSError) as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stepkit: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _options(methods: list[str], settings: dict) -> dict[str, dict]:
    """Return each method with those of the settings that it has."""
    has = {name: [*METHODS.find(name).option_names(), "score"] for name in methods}
    for key in settings:
        used = any(key in options for options in has.values())
        require(used, "--set", key, f"an option of {' or '.join(methods)}")
    return {name: {key: settings[key] for key in settings if key in has[name]} for name in has}


def _told(table: pd.DataFrame) -> int:
    """Say what a sweep has done; return the exit status."""
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
    run = {"sweep": _sweep, "reproduce": reproduce}[options.pop("command")]
    try:
        return run(**options)
    except (ValueError, FileNotFoundError) as error:
        print(f"stepkit: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
