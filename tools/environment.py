"""Find the Python environment in which `make` works, or make one: called by the Makefile.

    python tools/environment.py STAMP [--asked]

Taken as it is: the active virtual or conda environment, or the interpreter that the user named
(``--asked``), if it has every package of pyproject.toml. Otherwise ``.venv`` is made here from
requirements.lock. The path of the interpreter is written to STAMP. Standard library only: this runs
before anything is installed.
"""

import importlib
import os
import platform
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
# Compiled packages whose wrong pairing shows only when they are loaded.
LOADED = ["torch", "torchvision", "av", "numba", "skimage", "papermill"]


def say(text: str) -> None:
    """Print at once, so that the line stands before what a child process prints."""
    print(f"env: {text}", flush=True)


def lacking() -> list[str]:
    """Return what this interpreter lacks of pyproject.toml, extras included; empty: it fits."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # JupyterLab needs it, so nothing of ours can be here
        return ["the packages of pyproject.toml"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    gaps = []
    for wanted in [Requirement(text) for group in groups for text in group]:
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            gaps.append(str(wanted))
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            gaps.append(f"{wanted} (it has {found})")
    return gaps or unloadable()


def unloadable() -> list[str]:
    """Return the compiled packages that are installed and do not load, each with the reason."""
    gaps = []
    for name in LOADED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a wrong pair fails in many ways: ImportError, OSError, ...
            gaps.append(f"a {name} that loads ({error})")
    return gaps


def users_own(asked: bool) -> Path | None:
    """Return the interpreter of the user's environment if it fits, linked where that can be."""
    active = sys.prefix != sys.base_prefix or (Path(sys.prefix) / "conda-meta").is_dir()
    if not (asked or active) or (inside() and has_pip()):
        return None
    gaps = lacking()
    if gaps and inside():
        return None
    if gaps:
        more = f" and {len(gaps) - 4} more" if len(gaps) > 4 else ""
        say(f"the environment in {sys.prefix} lacks {', '.join(gaps[:4])}{more}")
        say("it stays as it is; a .venv of this project's own is used instead")
        return None
    say(f"using the environment in {sys.prefix}, which has every package")
    link(Path(sys.executable))
    return Path(sys.executable)


def link(python: Path, *options: str) -> None:
    """Install stepkit itself: only a link to this clone, nothing else. `make` does without."""
    command = ["-m", "pip", "install", "--quiet", "--no-deps", *options, "--editable", str(ROOT)]
    done = subprocess.run([str(python), *command], stderr=subprocess.PIPE, text=True)
    if done.returncode:  # no pip, as in uv's environments, or no right to write there
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        say(f"stepkit is not linked into it ({why}):")
        say("the commands of make find it all the same, a Python of yours only in this folder")


def inside() -> bool:
    """Return whether ``.venv`` runs this."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def has_pip() -> bool:
    """Return whether ``.venv`` is as made here; one of uv's has no pip, nor has half a one."""
    return (VENV / "bin" / "python").exists() and (VENV / "bin" / "pip").exists()


def made_venv() -> Path:
    """Return the interpreter of ``.venv``, made from requirements.lock where it is not yet."""
    python = VENV / "bin" / "python"
    if not has_pip():
        say(f"making .venv with Python {platform.python_version()}")
        create()
    done = VENV / LOCK.name  # the lock as it was installed
    if not (done.exists() and done.read_bytes() == LOCK.read_bytes()):
        size = "5 GB of disk, most of it GPU libraries of PyTorch" if is_linux() else "2 GB of disk"
        say(f"installing requirements.lock into .venv: 3 to 7 minutes the first time, {size}")
        install(python)
        done.write_bytes(LOCK.read_bytes())
    link(python, "--no-build-isolation")  # setuptools is in the lock
    return python


def is_linux() -> bool:
    """Return whether PyTorch's default build here brings the CUDA libraries."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def create() -> None:
    """Make an empty ``.venv``, or say what the system lacks for it."""
    try:
        importlib.import_module("ensurepip")
        importlib.import_module("venv")
    except ImportError:
        major, minor = sys.version_info[:2]
        raise SystemExit(
            f"env: this Python ({sys.executable}) cannot make virtual environments.\n"
            f"env: On Debian or Ubuntu: apt install python{major}.{minor}-venv\n"
            "env: Or name another Python 3.11 or newer: make PYTHON=/path/to/python3"
        ) from None
    broken = not (VENV / "bin" / "python").exists()  # its Python was upgraded away
    options = ["--clear"] if broken else []
    subprocess.run([sys.executable, "-m", "venv", *options, str(VENV)], check=True)


def install(python: Path) -> None:
    """Run pip on the lock, one counting line instead of its hundreds; all of them in a log."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "-r", str(LOCK)]
    log = VENV / "pip.log"
    terminal = sys.stdout.isatty()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as pip,
    ):
        collected = 0
        for line in pip.stdout:
            file.write(line)
            collected += line.startswith(("Collecting ", "Processing "))
            if line.startswith(("Collecting ", "Processing ", "Installing ")) and terminal:
                doing = line.split(" (from")[0].split(":")[0].strip()
                print(f"\r\033[K  {collected:3d}  {doing[:60]}", end="", flush=True)
    if terminal and collected:
        print()
    if pip.returncode:
        print("".join(log.read_text("utf-8").splitlines(keepends=True)[-15:]), file=sys.stderr)
        raise SystemExit(f"env: pip failed; all that it said is in {log.relative_to(ROOT)}")


def main() -> None:
    """Find or make the environment, and write its interpreter to the stamp."""
    start = time.monotonic()
    os.chdir(ROOT)
    stamp = Path(sys.argv[1])
    asked = "--asked" in sys.argv[2:]
    python = users_own(asked)
    other = VENV / "bin" / "python"
    if not python and other.exists() and not has_pip() and not inside():
        os.execv(other, [str(other), __file__, str(stamp)])  # uv's, which may have all
    python = python or made_venv()
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(f"{python}\n", encoding="utf-8")
    say(f"ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
