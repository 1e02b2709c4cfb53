"""``python -m stepkit reproduce``: execute the notebooks in order, bind what they show in a page.

The notebooks, and the parameter files of the profiles, lie beside the package in a clone. Papermill
executes each notebook in the interpreter that runs this, from the notebook's own folder (as
JupyterLab and nbval do), into ``<out>/<profile>/notebooks/``: under a temporary name first, renamed
once it is whole. Two run at a time, as one alone leaves a second core idle for half of its time; a
notebook waits for those that its metadata name (``"stepkit": {"after": [...]}``), whose maps it
would otherwise make again. ``report.html`` is made of what lies there, so it also shows what an
earlier run made and this one left alone.
"""

import contextlib
import hashlib
import json
import os
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import papermill
from tqdm import tqdm

from stepkit import report
from stepkit._checks import one_of, require
from stepkit._notebook import literal, parameters, partial, this_interpreter, tidy
from stepkit._settings import read_settings, read_yaml
from stepkit._workers import unwound

__all__ = ["Job", "Profile", "find_notebooks", "plan", "read_profile", "reproduce", "run"]

ROOT = Path(__file__).resolve().parents[1]
QUICK = "quick"


@dataclass(frozen=True)
class Profile:
    """A size to run the notebooks at: ``params/<name>.yaml``, or the notebooks' own defaults."""

    name: str
    about: str = ""
    defaults: dict = field(default_factory=dict)
    sections: dict = field(default_factory=dict)
    only: tuple = ()
    data_required: bool = False
    together: int = 2  # notebooks at a time


@dataclass(frozen=True)
class Job:
    """One notebook to execute: its source, the parameters that are injected, where it goes."""

    notebook: Path
    parameters: dict
    executed: Path
    cells: int = 0
    after: tuple = ()  # numbers of the notebooks that it builds on


def reproduce(profile=QUICK, only=(), settings=(), data=None, out=None, root=ROOT) -> int:
    """Execute notebooks, write the report, and return the exit status.

    Parameters
    ----------
    profile : str
        ``"quick"``, or the name of a file in ``params/``.
    only : sequence of str
        Numbers or names of notebooks; empty: those of the profile.
    settings : sequence of str
        ``"key=value"``, as `stepkit._settings.read_settings` takes them; they win over the profile.
        Such a run has notebooks and a report of its own, named by its settings.
    data : path, optional
        Passed to the notebooks that have a parameter ``data``.
    out : path, optional
        Where runs go, ``runs`` in the clone by default; the folder of this run is passed to the
        notebooks that have a parameter ``out``.
    root : Path
        The clone.

    Returns
    -------
    int
        0, or 1: a notebook failed, or 130: interrupted.

    Raises
    ------
    ValueError
        An unknown profile, notebook or parameter, a value of the wrong type, missing data: all
        found before anything runs.
    """
    folder = Path(out or root / "runs").expanduser().resolve() / profile
    chosen, given = read_profile(root, profile), read_settings(settings)
    jobs = plan(root, chosen, only, given, data, folder)
    print(f"Profile {profile}: {len(jobs)} notebooks into {folder}")
    if chosen.about:
        print(f"Expect {chosen.about}.")
    with unwound():
        try:
            status = run(jobs, chosen.together)
        finally:
            variant, sources = _variant(given), [*find_notebooks(root).values()]
            done = [executed_in(folder, source, given) for source in sources]
            page = report.write(folder / f"report{variant}.html", done, sources, chosen)
            print(f"Report: {page}")
    return status


# What is to be done


def find_notebooks(root: Path) -> dict[str, Path]:
    """Return the notebooks by number, in order."""
    found = {path.name[:2]: path for path in sorted(root.glob("notebooks/[0-9][0-9]_*.ipynb"))}
    expected = "those that come with a clone of the repository; run this in one (pip install -e .)"
    require(len(found) > 0, "notebooks", f"none in {root / 'notebooks'}", expected)
    return found


def read_profile(root: Path, name: str) -> Profile:
    """Read ``params/<name>.yaml``; ``quick`` has no file, its values stand in the notebooks."""
    if name == QUICK:
        return Profile(name, about="up to 10 minutes on two CPU cores")
    files = {path.stem: path for path in sorted(root.glob("params/*.yaml"))}
    one_of("--profile", name, [QUICK, *files])
    where = f"params/{name}.yaml"
    content = read_yaml(where, files[name].read_text("utf-8")) or {}
    require(isinstance(content, dict), where, type(content).__name__, "a mapping")
    keys = ("about", "defaults", "data_required", "only", "together")
    own = {key: content.pop(key) for key in keys if key in content}
    sections = {_number(key): values or {} for key, values in content.items()}
    strange = ", ".join(sorted(sections.keys() - find_notebooks(root).keys()))
    require(not strange, where, strange, f"{', '.join(keys)}, or the number of a notebook")
    return Profile(name, sections=sections, **own)


def plan(root: Path, profile: Profile, only, given: dict, data, folder: Path) -> list[Job]:
    """Return the notebooks to execute with their parameters, everything checked."""
    available = find_notebooks(root)
    declared = {number: parameters(path) for number, path in available.items()}
    numbers = numbers_of(available, only or profile.only)
    own = {"out": str(folder)}
    if data is not None:
        own["data"] = str(Path(data).expanduser().resolve())
        require(Path(own["data"]).is_dir(), "--data", data, "a folder that exists")
    missing = profile.data_required and data is None
    require(not missing, "--data", "none", f"the folder of videos that {profile.name} reads")
    _check_names("--set", given, [declared[number] for number in numbers])
    where = f"params/{profile.name}.yaml"
    _check_names(where, profile.defaults, declared.values())
    for number, section in profile.sections.items():
        _check_names(f"{where}, {number}", section, [declared[number]])

    jobs = []
    for number in numbers:
        wanted = profile.defaults | profile.sections.get(number, {}) | given
        names = declared[number]
        values = {key: _typed(key, wanted[key], names[key]) for key in names if key in wanted}
        values |= {key: value for key, value in own.items() if key in names}
        path = available[number]
        jobs.append(Job(path, values, executed_in(folder, path, given), *_read(path, values)))
    return jobs


def executed_in(folder: Path, notebook: Path, given: dict) -> Path:
    """Return where a notebook goes: runs with other settings are not in each other's way."""
    return folder / f"notebooks{_variant(given)}" / notebook.name


def _variant(given: dict) -> str:
    """Return a mark of the settings, for names of files; empty for none."""
    text = json.dumps(given, sort_keys=True, default=str)
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if given else ""


def _read(notebook: Path, values: dict) -> tuple[int, tuple]:
    """Return how many cells will run, and which notebooks have to run before."""
    book = nbformat.read(notebook, 4)
    cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in book.cells)
    after = book.metadata.get("stepkit", {}).get("after", ())
    return cells + bool(values), tuple(after)  # the parameters become a cell of their own


def _number(key) -> str:
    """Return the number of a notebook as two digits, however YAML or the user wrote it."""
    return str(key).removesuffix(".ipynb").partition("_")[0].zfill(2)


def numbers_of(available: dict[str, Path], only) -> list[str]:
    """Return the numbers of the notebooks that are named; of all, where none is."""
    for key in only:
        names = [path.stem for path in available.values()]
        require(_number(key) in available, "--only", key, f"one of {', '.join(names)}")
    chosen = {_number(key) for key in only} or available
    return [number for number in available if number in chosen]


def _check_names(where: str, given: dict, declared) -> None:
    """Refuse parameters that no notebook has: papermill only warns, and then hours are lost."""
    names = {name for names in declared for name in names} - {"out", "data"}
    for key in given:
        require(key not in ("out", "data"), where, key, f"the option --{key}")
        one_of(where, key, sorted(names))


def _typed(key: str, given, default):
    """Return ``given`` as the type of the default; a default that is not literal takes all."""
    kind = type(default)
    if default is None:
        return given
    if given is None and default == "":
        return ""  # what notebooks write for none
    if kind is float and type(given) is int:
        return float(given)
    if kind is type(given) is list and default:
        return [_typed(key, each, default[0]) for each in given]
    expected = f"{kind.__name__} like its default {default!r}"
    require(type(given) is kind, key, repr(given), expected)
    return given


# Doing it


def run(jobs: list[Job], together: int = 2) -> int:
    """Execute ``jobs`` under one progress bar of code cells; return the exit status."""
    kernels = this_interpreter(max(1, (os.cpu_count() or 1) // min(together, len(jobs))))
    todo, running, status = list(jobs), {}, 0
    # papermill would change the directory itself, and one thread's way back is another's way off
    where = contextlib.chdir(jobs[0].notebook.parent)
    bar = tqdm(total=sum(job.cells for job in jobs), unit="cell", mininterval=1)
    with where, bar, ThreadPoolExecutor(together) as pool:
        try:
            while running or (todo and not status):
                while not status and len(running) < together and (job := _next(todo, running)):
                    todo.remove(job)
                    running[pool.submit(execute, job, kernels, bar.update)] = job
                bar.set_description(", ".join(job.notebook.stem for job in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    status = max(status, _ended(running.pop(future), future, bar))
        except KeyboardInterrupt:
            names = ", ".join(job.notebook.name for job in running.values())
            bar.write(f"Interrupted in {names}", file=sys.stderr)
            kernels.kill()
            return 130
    return status


def _next(todo: list[Job], running: dict) -> Job | None:
    """Return the first job that needs none of those that are still to end."""
    open_ = {job.notebook.name[:2] for job in [*todo, *running.values()]}
    return next((job for job in todo if not open_ & set(job.after)), None)


def _ended(job: Job, future: Future, bar) -> int:
    error = future.exception()
    if error is None:
        bar.write(f"  {job.notebook.stem:<24}{future.result():6.0f} s")
        return 0
    bar.write(_failure(job, error), file=sys.stderr)  # also a kernel that died: stop, and say it
    return 1


def execute(job: Job, kernels: type, advance) -> float:
    """Execute one notebook; return its seconds. What ran of one that fails stays as partial."""
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial(job.executed)
    try:
        book = papermill.execute_notebook(
            literal(job.notebook),
            literal(unfinished),
            job.parameters,
            progress_bar=False,
            kernel_manager_class=kernels,
            start_timeout=120,
            iopub_timeout=60,  # a busy machine delivers a large figure late
            record_timing=False,
            on_cell_executed=lambda **_: advance(),
        )
    finally:
        if unfinished.exists():
            tidy(unfinished)
    os.replace(unfinished, job.executed)
    return book.metadata.papermill.duration


def _failure(job: Job, error: Exception) -> str:
    where, what = "", f"{type(error).__name__}: {error}"
    if hasattr(error, "exec_count"):  # papermill's, which knows the cell
        line = error.source.strip().partition("\n")[0]
        where, what = f", cell In [{error.exec_count}] ({line})", f"{error.ename}: {error.evalue}"
    return (
        f"Failed: {job.notebook.name}{where}\n  {what}\n  What ran of it: {partial(job.executed)}"
    )
