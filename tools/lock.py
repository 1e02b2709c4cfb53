"""Print requirements.lock: the versions of this environment that stepkit and its extras need.

    python tools/lock.py > requirements.lock

Run it in a .venv whose tests pass. Packages that exist for one platform alone (the CUDA libraries
that PyTorch pins itself, appnope on macOS) are left to the resolver, so that one file serves Linux
and macOS, the CPU build of PyTorch too.
"""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = ("cuda-", "nvidia-", "triton")
HEAD = """\
# Every package that stepkit, its extras and its tests need, at the versions they were tested with.
# Serves Linux and macOS, Python 3.11 and newer. torch and torchvision are a pair: change both.
# The CUDA libraries are absent on purpose: torch names them itself, and its CPU build needs none.
# Written by tools/lock.py.
"""


def direct() -> list[Requirement]:
    """Return what pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """Return name and version of ``wanted`` and of all that they need on this machine."""
    versions, seen, queue = {}, set(), list(wanted)
    environment = default_environment()
    while queue:
        requirement = queue.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen or key[0].startswith(PLATFORM):
            continue
        seen.add(key)
        distribution = metadata.distribution(requirement.name)
        versions[key[0]] = distribution.version.split("+")[0]  # "+cpu" names a build, no version
        for needed in map(Requirement, distribution.requires or []):
            extras = [{**environment, "extra": extra} for extra in (requirement.extras or {""})]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                queue.append(needed)
    return versions


def main() -> None:
    """Print the lock: what we ask for first, then what that brings along."""
    wanted = direct()
    versions = closure(wanted)
    ours = {canonicalize_name(requirement.name) for requirement in wanted}
    print(HEAD)
    for title, names in (("direct", ours), ("indirect", versions.keys() - ours)):
        print(f"# {title}")
        print("".join(f"{name}=={versions[name]}\n" for name in sorted(names)))


if __name__ == "__main__":
    main()
