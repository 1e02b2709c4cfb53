"""The paper's claims beside what its authors' own scores say: the first part of the claims page.

The words are ours; every number is looked up in the tracked tables.
"""

import pandas as pd

from stepkit import stats
from stepkit.published import LABELS, authors
from stepkit.published.decided import MARGIN
from stepkit.published.scores import LENGTHS, PRINTED, UNITS, UNPRINTED
from stepkit.viz import caption

COLUMN = ["dataset", "model", "unit"]
UCF, EPIC, SOMETHING = "ucf101-24", "epic-object", "something-v2"
R2P1D, R50L = "r2plus1d_18", "r50l"


def page() -> str:
    """Return the page's first part, Markdown."""
    rows = [
        ["claim", "the authors' own scores", "verdict", "what follows"],
        ["---"] * 4,
        *_claims(),
    ]
    return "\n\n".join([*_HEAD, _markdown(rows), *_RUN_AND_NOT_PRINTED, _markdown(_not_printed())])


def finding() -> list[str]:
    """Return what the scores decide, in three sentences: those of the README."""
    gaps, alpha = _gaps(), _alphas()
    where = {"dataset": UCF, "model": R2P1D, "unit": "patch"}
    nearest = _pm(_at(gaps, **where, against="score_cam"))
    trails = [
        f"{LABELS[dataset]} ({_pm(_at(gaps, **where | {'dataset': dataset}, against='grad_cam'))})"
        for dataset in (EPIC, SOMETHING)
    ]
    without = gaps[gaps["against"] == "step_t0"]
    helps = without[without["low"] > 0]
    insertion = alpha[(alpha["metric"] == "insertion") & alpha["unit"].isin(UNITS)]
    r50l = insertion[insertion["model"] == R50L]["mean"]
    deletion = [_at(alpha, **where | {"unit": u}, metric="deletion")["mean"] for u in UNITS]
    return [
        "**STEP is ahead of every method on UCF101-24 with R(2+1)D** (by patches "
        f"{nearest} over the nearest, Score-CAM), **behind Grad-CAM with the same network** on "
        f"{' and '.join(trails)}, and in no column of the recurrent network ahead of all "
        "methods.",
        f"**Its new term L_K helps**, in {len(helps)} of {len(without)} columns, by "
        f"{helps['mean'].min():.3f} to {helps['mean'].max():.3f}; no other length of its kernel is "
        "better than the paper's T_K = 8, and 11 is level with it.",
        "**How reliable a metric is depends on the network**: α of insertion is "
        f"{_number(_at(insertion, **where))} for the first pair and {r50l.min():.3f} to "
        f"{r50l.max():.3f} for the recurrent network; deletion, set aside as unreliable, has "
        f"{deletion[0]:.3f} and {deletion[1]:.3f} for the first pair.",
    ]


_HEAD = [
    "# The paper's claims, by its own scores",
    f"""The authors' repository holds, in its history, the score of every map of Tables IV and V,
video by video. Our code computes from them what stands here: `python -m stepkit.published --help`
says how to repeat it, and `stepkit/paper/authors_*.csv` has the tables. Differences are paired by
video; brackets are 95 % intervals over scenes (groups of UCF101, recordings of EPIC-Kitchens,
videos of Something-V2); in round brackets, the difference of the paper's printed numbers. A
*column* is a dataset, a network and a unit, as in Table V. Verdicts:
**holds**; **level**, within {MARGIN} of each other; **does not hold**; **undecided**; **cannot be
tested here**.""",
]
_RUN_AND_NOT_PRINTED = [
    "## Run, and not in Table V",
    """The logs hold two methods that Table V does not print: Score-CAM, and guided backprop on two
of the datasets. In bold, where one of them has the highest mean of all methods.""",
]


def _claims() -> list[list[str]]:
    return [*_of_reliability(), *_of_the_term(), *_of_table_five(), *_NOT_HERE]


def _of_reliability() -> list[list[str]]:
    alpha = _alphas()
    units, gap = [], []
    for unit in UNITS:
        where = {"dataset": UCF, "model": R2P1D, "unit": unit}
        pair = [_number(_at(alpha, **where, metric=m)) for m in ("insertion", "deletion")]
        gap.append(_pm(_at(alpha, **where, metric="insertion - deletion")))
        units.append(f"{pair[0]} against {pair[1]} ({unit})")
    by_model = {}
    for model in (R2P1D, R50L):
        some = alpha[(alpha["model"] == model) & (alpha["unit"] == "patch")]
        some = some[some["metric"] == "insertion"].set_index("dataset")
        by_model[model] = ", ".join(f"{LABELS[d]} {_number(row)}" for d, row in some.iterrows())
    apart = alpha[alpha["unit"] == "patch - superpixel"]
    insertion = apart[apart["metric"] == "insertion"]
    words = stats.verdict(insertion, MARGIN)
    higher = insertion[words == "higher"]
    deletion = _at(apart, metric="deletion")
    beat = alpha.groupby("metric")["beat_random"].agg(["min", "max"])
    return [
        [
            "Deletion is much less reliable than insertion (§V-C, Fig. 3)",
            f"Deletion is in the logs for UCF101-24 with R(2+1)D. α of insertion {units[0]}, "
            f"{units[1]}; differences {gap[0]} and {gap[1]}.",
            "**holds** there; **cannot be tested here** for the other five pairs of dataset and "
            "network",
            "For that pair insertion is the better choice.",
        ],
        [
            "Insertion is reliable enough to rank methods by, on both networks (§V-C)",
            f"α by patches, R(2+1)D: {by_model[R2P1D]}. R50L: {by_model[R50L]}.",
            "**holds** for R(2+1)D; **does not hold** for R50L, where α is about that of the "
            "metric set aside above, or lower",
            "α belongs to a network and its data. Table V's R50L columns rank methods by a metric "
            "that ranks them differently on each video.",
        ],
        [
            "Inserted by patch or by superpixel, it is equally reliable (§V-C)",
            f"Patch minus superpixel {_span(insertion)}; above zero for {_pairs(higher)}.",
            f"**does not hold** in {len(higher)} of {len(insertion)} pairs, **level** in "
            f"{(words == 'level').sum()}, **undecided** in {(words == 'undecided').sum()}",
            "Report both units.",
        ],
        [
            "Deleted by superpixel, it is slightly more reliable than by patch (§V-C)",
            f"Patch minus superpixel {_pm(deletion)}, UCF101-24 with R(2+1)D.",
            f"**{stats.verdict(pd.DataFrame([deletion]))[deletion.name]}**",
            "",
        ],
        [
            "By some metrics random maps score better than a method's (§IV-B, Fig. 4)",
            "Share of the five methods that beat random on a video: deletion "
            f"{_range(beat, 'deletion')} (patch, superpixel), insertion "
            f"{_range(beat, 'insertion')} over the twelve columns.",
            "**holds**",
            "A random map belongs beside every metric.",
        ],
    ]


def _of_the_term() -> list[list[str]]:
    gaps = _gaps()
    by = {length: gaps[gaps["against"] == length] for length in LENGTHS}
    without = by["step_t0"]
    lengths = [
        f"{_above(by[m])} against {m.removeprefix('step_t')} ({_span(by[m])}; "
        f"level in {(by[m]['verdict'] == 'level').sum()})"
        for m in LENGTHS[1:]
    ]
    pair = {model: without[without["model"] == model] for model in (R2P1D, R50L)}
    low, high = (part.sort_values(["dataset", "unit"]) for part in pair.values())
    apart = int((low["low"].to_numpy() > high["high"].to_numpy()).sum())
    counts = without["verdict"].value_counts()
    cylinder = gaps[gaps["against"] == "step_t8_cylinder"]
    return [
        [
            "L_K improves STEP in most cases (§V-D, Table IV)",
            f"T_K = 8 minus no L_K: above zero in {_above(without)} of 12 columns; "
            f"{_span(without)} in all of them.",
            f"**holds** in {counts['holds']} columns, **level** in {counts['level']}",
            "The term is worth having.",
        ],
        [
            "T_K = 8 is the best length (§V-D, Table IV)",
            f"T_K = 8 is above zero in {'; '.join(lengths)}; below zero in none.",
            "**level** with 11; with 5 in most columns; **holds** against 14 in most",
            "8 is a safe choice, and 5 or 11 cost next to nothing.",
        ],
        [
            "A cylinder as kernel does about as well as the ellipsoid (§III-B)",
            f"Ellipsoid minus cylinder {_span(cylinder)}; level in "
            f"{(cylinder['verdict'] == 'level').sum()} of {len(cylinder)} columns.",
            "**level**",
            "",
        ],
        [
            "L_K helps R50L less than R(2+1)D (§V-D)",
            f"R(2+1)D {_span(pair[R2P1D])}, R50L {_span(pair[R50L])}; the intervals lie apart in "
            f"{apart} of 6 pairs of columns.",
            f"**holds** in {apart}, **undecided** in {6 - apart}" if apart < 6 else "**holds**",
            "",
        ],
    ]


def _of_table_five() -> list[list[str]]:
    gaps, means = _gaps(), authors("means")
    printed = gaps[gaps["against"].isin(PRINTED)]
    worst = printed.loc[printed.groupby(COLUMN, sort=False)["low"].idxmin()]
    leads = worst[worst["low"] > 0]
    p = printed["p"].where(printed["mean"] > 0, 1.0)  # that it is not ahead of all nine
    corrected = stats.holm(p.groupby([printed[key] for key in COLUMN], sort=False).max())
    behind = printed[printed["high"] < 0]
    trailing = behind.loc[behind.groupby(COLUMN, sort=False)["mean"].idxmin()]
    none = 12 - len(leads) - len(trailing)
    counts = {
        LABELS[model]: part["verdict"].value_counts().to_dict()
        for model, part in printed.groupby("model", sort=False)
    }
    told = "; ".join(
        f"{model}: " + ", ".join(f"{word} {count}" for word, count in found.items())
        for model, found in counts.items()
    )
    ranks = authors("ranks")
    ranks = ranks[ranks["method"] == "step"].groupby("model")["mean"].agg(["min", "max"])
    two = means[(means["dataset"] == SOMETHING) & (means["model"] == R2P1D)]
    two = two[two["unit"] == "patch"].set_index("method")
    third = two.loc[PRINTED, "mean"].drop(["grad_cam", "xrai"]).idxmax()
    return [
        [
            "STEP is the best in several columns (§V-G, Table V)",
            f"Ahead of all nine printed methods, every interval above zero: {_columns(leads)}; "
            f"after Holm's correction over twelve columns {(corrected < 0.05).sum()}.",
            f"**holds** in {len(leads)} of 12 columns",
            "",
        ],
        [
            "In the other columns it is competitive (§V-G)",
            "Behind, at most: "
            + "; ".join(
                f"{_column(row)} {_beside(row)} to {caption(row['against'])}"
                for _, row in trailing.iterrows()
            )
            + f". In the other {none} no printed method is ahead of it.",
            f"**does not hold** in {len(trailing)} columns; **level** or **undecided** in {none}",
            "On R(2+1)D the lead depends on the dataset.",
        ],
        [
            "It does well on both kinds of networks (§V-G)",
            f"Against the nine printed methods in six columns, is STEP better? {told}. Mean rank "
            f"among the ten: R(2+1)D {_range(ranks, R2P1D, 1)}, R50L {_range(ranks, R50L, 1)}.",
            "**holds** for R(2+1)D more than for R50L",
            "",
        ],
        [
            "On Something-V2 with R(2+1)D, Grad-CAM and XRAI are well above the others (§V-G)",
            f"By patches {_number(two.loc['grad_cam'])} and {_number(two.loc['xrai'])}; the "
            f"nearest other printed one, {caption(third)}, {_number(two.loc[third])}; STEP "
            f"{_number(two.loc['step'])}. Score-CAM, not printed, {_number(two.loc['score_cam'])}.",
            "**holds**",
            "",
        ],
    ]


_NOT_HERE = [
    [
        "Maps that are continuous and smooth score higher (§V-G)",
        "The logs hold no maps.",
        "**cannot be tested here**",
        "",
    ],
    [
        "STEP points best (§V-H, Table VI)",
        "The logs hold no hits.",
        "**cannot be tested here**",
        "See the profiles below.",
    ],
    [
        "Networks retrained on what STEP keeps are the most accurate (§V-I, Fig. 8)",
        "The scores hold no accuracies.",
        "**cannot be tested here**",
        "See the profiles below.",
    ],
]


def _not_printed() -> list[list[str]]:
    gaps, means = _gaps(), authors("means")
    means = means[means["metric"] == "insertion"]
    means = means[~means["method"].str.startswith("step_")]
    head = ["column", *(t for m in UNPRINTED for t in (caption(m), f"STEP minus {caption(m)}"))]
    rows = [[*head, "highest mean"], ["---"] * (len(head) + 1)]
    for key, part in means.groupby(COLUMN, sort=False):
        known, where = part.set_index("method")["mean"], dict(zip(COLUMN, key, strict=True))
        best, row = known.idxmax(), [_column(where)]
        for method in UNPRINTED:
            if method not in known:
                row += ["not run", ""]
                continue
            bold = "**" if method == best else ""
            row += [f"{bold}{known[method]:.3f}{bold}", _pm(_at(gaps, **where, against=method))]
        rows.append([*row, f"{caption(best)} {known[best]:.3f}"])
    return rows


def _gaps() -> pd.DataFrame:
    gaps = authors("differences")
    return gaps[gaps["metric"] == "insertion"]


def _alphas() -> pd.DataFrame:
    alpha = authors("reliability")
    return alpha[alpha["form"] == "as printed"]


def _at(table: pd.DataFrame, **where) -> pd.Series:
    for key, value in where.items():
        table = table[table[key] == value]
    return table.iloc[0]


def _number(row, columns: tuple = ("mean", "low", "high")) -> str:
    return stats.written(pd.DataFrame([row])[[*columns]], 3).iloc[0]


def _pm(row) -> str:
    return ("+" if row["mean"] > 0 else "") + _number(row)


def _beside(row) -> str:
    """Write a difference with the paper's own in round brackets."""
    sign = "+" if row["mean"] > 0 else ""
    return sign + _number(row, ("mean", "low", "high", "paper"))


def _span(rows: pd.DataFrame) -> str:
    low, high = rows["mean"].min().round(3) + 0.0, rows["mean"].max().round(3) + 0.0  # no -0.000
    return f"{low:+.3f} to {high:+.3f}"


def _range(table: pd.DataFrame, row: str, digits: int = 2) -> str:
    low, high = table.loc[row]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _above(rows: pd.DataFrame) -> int:
    return int((rows["low"] > 0).sum())


def _column(row) -> str:
    return f"{LABELS[row['dataset']]}, {LABELS[row['model']]}, {row['unit']}"


def _columns(rows: pd.DataFrame) -> str:
    return "; ".join(_column(row) for _, row in rows.iterrows())


def _pairs(rows: pd.DataFrame) -> str:
    return "; ".join(
        f"{LABELS[row['dataset']]}, {LABELS[row['model']]} {_pm(row)}" for _, row in rows.iterrows()
    )


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
