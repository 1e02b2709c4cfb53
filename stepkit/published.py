"""What is published: the tables that the paper prints, and what its authors' own scores decide.

The authors' repository holds, in its history, the score of every map of Tables IV and V, video by
video. It has no licence, so the scores are not part of this project; what our code computes from
them is, ``stepkit/paper/authors_*.csv``. ``python -m tools.authors --help`` says how to read the
scores out of a clone, and how to compute these tables again.
"""

from pathlib import Path

import pandas as pd

from stepkit._checks import one_of, require

__all__ = ["LABELS", "STRONG", "UNPRINTED", "authors", "beside", "table"]

STANDS_FOR = {"appearance": "ucf101-24", "object": "epic-object", "motion": "something-v2"}
LABELS = {"ucf101-24": "UCF101-24", "epic-object": "EPIC-Object", "something-v2": "Something-V2"}
LABELS |= {"r2plus1d_18": "R(2+1)D", "r50l": "R50L"}  # as the paper writes them
FOLDER = Path(__file__).parent / "paper"
TABLES = {"accuracy": 3, "kernel_length": 4, "insertion": 5, "pointing": 6}  # their numbers
AUTHORS = ("means", "differences", "reliability", "ranks", "classes", "power")
# The methods of Table V, in its order.
PRINTED = ["gradient_x_input", "gradient", "integrated_gradients", "smoothgrad"]
PRINTED += ["smoothgrad_squared", "blur_ig", "xrai", "excitation_backprop", "grad_cam"]
UNPRINTED = ["score_cam", "guided_backprop"]  # run by the authors, and in no table of the paper
STRONG = ["smoothgrad_squared", "xrai", "excitation_backprop", "grad_cam"]  # "noticeable", §V-G
MARGIN = 0.02  # of AUC: less is of no interest


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
    return pd.read_csv(FOLDER / f"table{TABLES[name]}_{name}.csv")


def authors(name: str, folder: str = "") -> pd.DataFrame:
    """Return what the authors' own scores say; every row names the runs that it was computed from.

    Parameters
    ----------
    name : str
        ``"means"``: of every method, the paper's number beside. ``"differences"``: STEP (T_K = 8)
        minus every method, T_K and variant. ``"reliability"``: α as printed and as coded.
        ``"ranks"``: mean ranks among the methods of Table V. ``"classes"``: differences by class of
        UCF101-24. ``"power"``: for each pair of methods, how many scenes tell a difference.
    folder : str
        Where ``python -m tools.authors tables`` put tables computed anew. Empty: the tracked ones.

    Returns
    -------
    DataFrame
        Columns as ``tools/authors/decided.py`` says. Intervals are over scenes.
    """
    one_of("name", name, AUTHORS)
    path = Path(folder or FOLDER) / f"authors_{name}.csv"
    expected = "a folder that `python -m tools.authors tables --out` wrote"
    require(path.is_file(), "authors", f"no {path}", expected)
    return pd.read_csv(path)


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
