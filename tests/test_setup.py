"""What stands in several places agrees (versions, packages, profiles); notebooks keep form."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import nbformat
import numba
import numpy as np
import papermill
import pytest
import yaml
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import stepkit
from stepkit import _kernels
from stepkit.__main__ import parser
from stepkit._settings import read_settings
from stepkit.reproduce import QUICK, plan, read_profile

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
GROUPS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
NEEDED = [Requirement(text) for group in GROUPS for text in group]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted(path.stem for path in (ROOT / "params").glob("*.yaml"))
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge has another name
OLDEST = PROJECT["requires-python"].removeprefix(">=")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return dict(pairs)


# Packages


def test_the_lock_satisfies_pyproject():
    locked = lock()
    for needed in NEEDED:
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)]), needed


def test_the_lock_holds_versions_and_nothing_else():
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines():
        assert re.fullmatch(r"(#.*|[a-z0-9-]+==[0-9][0-9a-z.]*)?", line), line


def test_the_lock_serves_the_oldest_python_that_is_promised():
    """Not only the one at hand: Debian 12 has 3.11.2, and some packages ask for a later patch."""
    checked = 0
    for name, version in lock().items():
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:  # an environment of the user's own
            continue
        if found["Version"].split("+")[0] == version:
            checked += 1
            asked = found.get("Requires-Python")
            assert SpecifierSet(asked or "").contains(f"{OLDEST}.0"), f"{name} asks for {asked}"
    if checked < len(NEEDED) / 2:
        pytest.skip("this environment is not that of the lock")


def test_the_lock_names_a_torch_and_the_torchvision_made_for_it():
    locked = lock()
    torch, vision = (locked[name].split(".")[1] for name in ("torch", "torchvision"))
    assert int(vision) - int(torch) == 15  # 2.11 with 0.26, 2.12 with 0.27, ...


def test_conda_names_the_same_packages_and_bounds():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    listed += listed.pop()["pip"]
    conda = {needed.name: needed.specifier for needed in map(Requirement, listed)}
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    conda.pop("pip")
    assert conda == {CONDA_NAMES.get(need.name, need.name): need.specifier for need in NEEDED}


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert citation["version"] == stepkit.__version__
    assert f"## [{stepkit.__version__}]" in changelog


# Environments

BARE = """
import importlib.metadata, os, pwd
real = importlib.metadata.distribution
def installed(name):
    if name == "stepkit":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
def nameless(number):
    raise KeyError(number)
importlib.metadata.distribution, pwd.getpwuid = installed, nameless
import stepkit, torch
from stepkit import _kernels
cells, weights = torch.tensor([[[3.0, 5.0]]]), torch.ones(1, 1)
print(stepkit.__file__, _kernels.smooth_max(cells, weights, (1, 1), 0)[0].flatten().tolist())
from matplotlib.figure import Figure
from stepkit import study, report
study.Study(out="run").figure("empty", Figure())
print(report.machine()["stepkit"])
"""


def test_import_needs_no_home_no_writable_folder_no_installation_and_no_name(tmp_path):
    package, ignored = tmp_path / "stepkit", shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "stepkit", package, ignore=ignored)
    # where Python and numba would write: not even root makes a folder of a file
    (package / "__pycache__").touch()
    personal = ("HOME", "USER", "LOGNAME", "LNAME", "NUMBA_", "XDG_", "TORCH")
    given = {name: text for name, text in os.environ.items() if not name.startswith(personal)}
    # Matplotlib finds a folder by itself, and says so
    given |= {"HOME": os.devnull, "PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)}
    run = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BARE]  # of its parts
    done = subprocess.run(run, env=given, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    found, version = done.stdout.splitlines()
    assert found == f"{package}/__init__.py [3.0, 5.0]"
    (told,) = (tmp_path / "run" / "figures").rglob("settings.json")
    assert version == json.loads(told.read_text())["stepkit"] == stepkit.__version__


def test_loops_run_where_the_disk_is_full_and_where_their_cache_is_damaged(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="limits are set on Unix only")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def largest() -> float:
        cells, weights = np.full((1, 1, 1), 3, np.float32), np.ones((1, 1), np.float32)
        out, total = np.zeros((2, 1, 1, 1, 1), np.float32)
        _kernels._compiled(_kernels._smooth_max.py_func)(cells, weights, out, total, 0, 0, 1)
        return float(out.item())

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        assert largest() == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert largest() == 3
    kept = list(tmp_path.rglob("*.nb?"))
    assert len(kept) == 2  # where it can be used, it is
    for file in kept:
        file.write_bytes(b"")
    assert largest() == 3
    assert all(file.stat().st_size for file in kept)


def test_an_environment_that_has_everything_but_pip_is_taken(tmp_path):
    venv.create(tmp_path / "own", with_pip=False)
    python = tmp_path / "own" / "bin" / "python"
    (packages,) = (tmp_path / "own" / "lib").glob("*/site-packages")
    (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "pip.py").write_text("raise ImportError('No module named pip')")
    run = [python, ROOT / "tools" / "environment.py", tmp_path / "stamp"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "which has every package" in said
    assert "No module named pip" in said
    assert (tmp_path / "stamp").read_text().strip() == str(python)


FAKE = """#!/bin/sh
case "$1" in
-c) ;;
tools/environment.py) mkdir -p .make; echo "$0" > "$2" ;;
*) echo "path $PYTHONPATH"; printf '%s\\n' "$@" ;;
esac
"""


def make(folder: Path, *arguments: str) -> list[str]:
    """Return what `make` gives to an interpreter, one line each, after the path of modules."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tools", folder / "tools")
    python = folder / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    run = ["make", "--no-print-directory", f"PYTHON={python}", *arguments]
    given = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    given["PYTHONPATH"] = "/elsewhere"
    return subprocess.check_output(run, cwd=folder, env=given, text=True).splitlines()


def test_make_says_how_threads_wait_and_keeps_freed_memory_unless_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    names = ("GOMP_SPINCOUNT", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    lines = "".join(f'echo "${name}"\n' for name in names)
    monkeypatch.setitem(globals(), "FAKE", FAKE.replace('*) echo "path', f'*) {lines}echo "path'))
    assert make(tmp_path, "reproduce")[:3] == ["7", "0", str(4 << 30)]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("seed=1 clips=4", {"seed": 1, "clips": 4}),
        ("models=[a, b] seed=1", {"models": ["a", "b"], "seed": 1}),
        ("video='my clip.mp4'", {"video": "my clip.mp4"}),
        ("recipe={epochs: 4, rate: 1e-3}", {"recipe": {"epochs": 4, "rate": 0.001}}),
    ],
)
def test_make_passes_settings_and_folders_as_they_are(tmp_path, text, settings):
    folder = tmp_path / "a clone"
    folder.mkdir()
    path, *given = make(folder, "reproduce", f"SET={text}", "DATA=/my 'own' videos")
    assert path == f"path {folder}:/elsewhere"  # this clone, whatever is installed
    given = parser().parse_args(given[2:])  # after: -m stepkit
    assert read_settings(given.settings) == settings
    assert given.data == Path("/my 'own' videos")


# Profiles and notebooks


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_only_parameters_that_exist(name, tmp_path):
    assert name != QUICK  # its values are the notebooks' own
    profile = read_profile(ROOT, name)
    assert plan(ROOT, profile, (), {}, tmp_path, tmp_path)


@each_notebook
def test_a_notebook_has_one_cell_of_parameters_and_papermill_sees_all_of_them(path):
    cells = [c for c in code(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    assigned = [
        target.id
        for node in ast.parse(cells[0].source).body
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
    ]
    assert assigned == list(papermill.inspect_notebook(path))


@each_notebook
def test_a_notebook_carries_nothing_of_a_machine_or_a_session(path):
    content = json.loads(path.read_text("utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert not {"widgets", "papermill"} & content["metadata"].keys()
    assert not any("papermill" in cell["metadata"] for cell in content["cells"])
    told = "\n".join(json.dumps(out) for cell in code(path) for out in cell.outputs)
    assert not re.findall(rf"{re.escape(str(ROOT))}|/(?:home|root|Users|tmp)/[\w.-]+", told)


@each_notebook
def test_a_notebook_is_short_and_defines_nothing(path):
    cells = code(path)
    lines = [len(cell.source.splitlines()) for cell in cells]
    parameters = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    assert max(n for i, n in enumerate(lines) if i not in parameters) <= 15
    assert all(lines[i] <= 20 for i in parameters)  # a table, a line for each
    assert statistics.median(lines) <= 5
    assert not [
        c.source for c in cells if re.search(r"^\s*(async def|def|class)\s", c.source, re.M)
    ]
    assert sum(len(cell.source) for cell in nbformat.read(path, 4).cells) < 60_000


@each_notebook
def test_a_notebook_is_stored_as_it_ran(path):
    """Every cell counted in order, none failed: nbval needs the counts, readers the outputs."""
    cells = [cell for cell in code(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


def code(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


# What nbval is told to overlook


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (" 45%|####5     | 9/20 [00:01<00:01,  7.89it/s]", "PROGRESS"),
        ("<Figure object at 0x7f3a2b10>", "<Figure object at ADDRESS>"),
        ("wrote /somewhere/runs/quick/maps.csv", "wrote PATH"),
        ("took 12.5 s, then 3 minutes", "took DURATION, then DURATION"),
        ("2026-01-31 12:00:01 key 9f86d081884c7d65", "TIME key HASH"),
        ("shape (3, 16, 112, 112), mean 0.5 min 0.1", "shape (3, 16, 112, 112), mean 0.5 min 0.1"),
        ("alpha 0.123456789012 and 1/2", "alpha 0.123456789012 and 1/2"),
    ],
)
def test_sanitizing_wipes_what_differs_and_leaves_what_counts(text, left):
    patterns = get_sanitize_patterns((ROOT / "tests" / "sanitize.cfg").read_text("utf-8"))
    for regex, replacement in patterns:
        text = re.sub(regex, replacement, text)
    assert text == left
