"""Names for what stepkit and its users bring: methods, metrics, datasets."""

import importlib
from collections import UserDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from stepkit._checks import one_of, require

__all__ = ["Registry", "bring"]


class Registry(UserDict):
    """Rows by name, in the order in which their decorators were run.

    Parameters
    ----------
    kind : str
        What it holds, for errors: "method", "metric", "dataset".
    row : dataclass
        With the fields ``name`` and ``run``; the others are typed facts, most with a default.
    """

    def __init__(self, kind: str, row: type):
        super().__init__()
        self.kind, self.row = kind, row

    def register(self, name: str, **facts) -> Callable[[Callable], Callable]:
        """Return a decorator that keeps a function under ``name``; the function stays as it is.

        A function may be defined anew (a notebook cell that runs again). Another one's name may
        not be taken.

        Raises
        ------
        ValueError
            No name, a name with ``@`` or ``/`` in it, one that is taken, a fact that is unknown.
        """
        plain = isinstance(name, str) and name and not set(name) & set("@/\\\0")
        require(plain, self.kind, repr(name), "a name without '@' and slashes")
        known = {f.name for f in fields(self.row)} - {"name", "run"}
        for fact in facts:
            one_of(f"fact of a {self.kind}", fact, known)

        def keep(run: Callable) -> Callable:
            taken = self.get(name)
            same = taken is None or _place(taken.run) == _place(run)
            require(same, self.kind, f"{name!r}, which is another's", "a name of its own")
            self[name] = self.row(name=name, run=run, **facts)
            return run

        return keep

    def find(self, given: str | Callable) -> Any:
        """Return the row of a name or of a function; a function without a row gets a plain one."""
        if callable(given):
            rows = [row for row in self.values() if row.run is given]
            return rows[0] if rows else self.row(name=_name(given), run=given)
        one_of(self.kind, given, self)
        return self[given]


def bring(extra: str) -> None:
    """Import a module of one's own, by its dotted name; what it registers is known from then on."""
    try:
        if extra:
            importlib.import_module(extra)
    except ImportError as error:
        expected = "the dotted name of a module on the path (PYTHONPATH)"
        raise ValueError(f"extra: got {extra!r} ({error}), expected {expected}") from error


def _name(run: Callable) -> str:
    return getattr(run, "__name__", type(run).__name__)


def _place(run: Callable) -> tuple:
    return getattr(run, "__module__", None), getattr(run, "__qualname__", id(run))
