"""The numbers that the paper prints (Tables III-VI), to stand beside ours."""

from pathlib import Path

import pandas as pd

from stepkit._checks import one_of

__all__ = ["FOLDER", "LABELS", "STANDS_FOR", "TABLES", "beside", "family", "table"]

STANDS_FOR = {"appearance": "ucf101-24", "object": "epic-object", "motion": "something-v2"}
LABELS = {"ucf101-24": "UCF101-24", "epic-object": "EPIC-Object", "something-v2": "Something-V2"}
LABELS |= {"r2plus1d_18": "R(2+1)D", "r50l": "R50L"}  # as the paper writes them
FOLDER = Path(__file__).parents[1] / "paper"
TABLES = {
    "accuracy": "table3_accuracy.csv",
    "kernel_length": "table4_kernel_length.csv",
    "insertion": "table5_insertion.csv",
    "pointing": "table6_pointing.csv",
}


def table(name: str) -> pd.DataFrame:
    """Return a published table in long form.

    Parameters
    ----------
    name : str
        ``"accuracy"`` (Table III: ``model, dataset, top1, top5``), ``"kernel_length"`` (IV),
        ``"insertion"`` (V: ``method, dataset, model, unit, insertion_auc``) or ``"pointing"`` (VI:
        ``method, dataset, model, hit_percent``).

    Examples
    --------
    >>> len(table("accuracy"))
    6
    """
    one_of("name", name, TABLES)
    return pd.read_csv(FOLDER / TABLES[name])


def family(model: str) -> str:
    """Return the paper's name for a model's family: ``"r2plus1d"`` or ``"r50l"``."""
    found = [name for name in ("r2plus1d", "r50l") if model.startswith(name)]
    one_of("model", model.split("_")[0], ("r2plus1d", "r50l"))
    return found[0]


def beside(ours: pd.DataFrame, name: str, column: str) -> pd.Series:
    """Return the paper's number for every row of ``ours``, NaN where it prints none.

    ``ours`` is indexed by (some of) ``dataset``, ``model``, ``method`` and ``unit``; a generated
    dataset looks up the one it stands in for, a narrow model its family.
    """
    wanted = ours.index.to_frame(index=False)
    wanted["dataset"] = wanted["dataset"].replace(STANDS_FOR)
    known = wanted["model"].str.startswith(("r2plus1d", "r50l"))  # else the reader's own
    wanted["model"] = wanted["model"].mask(known, wanted["model"].str.split("_").str[0])
    found = wanted.merge(table(name), "left", [c for c in table(name) if c in wanted])
    return pd.Series(found[column].to_numpy(), ours.index, name="paper")
