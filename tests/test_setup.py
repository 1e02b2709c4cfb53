"""What stands in several places agrees (versions, packages, profiles); notebooks keep form."""

import ast
import json
import re
import statistics
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import stepkit
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
    for name in lock():
        try:
            asked = metadata.metadata(name).get("Requires-Python")
        except metadata.PackageNotFoundError:  # an environment of the user's own
            continue
        checked += 1
        assert SpecifierSet(asked or "").contains(f"{OLDEST}.0"), f"{name} asks for {asked}"
    assert checked > len(NEEDED) / 2


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
    assert citation["version"] == stepkit.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in changelog


# Profiles and notebooks


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_sets_only_parameters_that_exist(name, tmp_path):
    assert name != QUICK  # its values are the notebooks' own
    profile = read_profile(ROOT, name)
    assert plan(ROOT, profile, (), (), tmp_path, tmp_path)


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
    assert max(lines) <= 15
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
