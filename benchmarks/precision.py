"""STEP by bfloat16 against STEP by float32: do the maps say the same?

    python benchmarks/precision.py [--clips 6] [--out runs/benchmarks]

Generated clips, networks as the notebooks train them, preset fast. Maps of both are scored by the
float32 network. A CPU without bfloat16 emulates it: slow, and rounded in the same places.
"""

import argparse

import torch
from common import difference, record, row

import stepkit as sk
from stepkit.study import Study

CELLS = [("r2plus1d_narrow", d) for d in ("appearance", "object", "motion")]
CELLS += [("r50l_narrow", "appearance")]


def correlations(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Return Pearson's correlation of two heatmaps, clip by clip; (N, T, H, W) each."""
    pairs = zip(a.flatten(1), b.flatten(1), strict=True)
    return [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]


def compared(study: Study, name: str, dataset: str) -> list[dict]:
    """Return how much the maps of a dataset correlate, and how far their scores are apart."""
    raw, batch = study.network(name, dataset), study.batch(dataset)
    models = {"float32": sk.prepare(raw), "bfloat16": sk.prepare(raw, "bfloat16")}
    found, scores = {}, {}
    for kind, model in models.items():
        found[kind] = sk.step(model, batch.clips, batch.targets, "fast")
        assert found[kind].precision == kind
        given = models["float32"], batch.clips, found[kind].heatmap, batch.targets
        scores[kind] = sk.insertion(*given, steps=16).auc
    case = f"{dataset}, {name}, {len(batch.clips)} clips"
    maps = correlations(found["float32"].heatmap, found["bfloat16"].heatmap)
    apart = (scores["bfloat16"] - scores["float32"]).numpy()
    return [
        row("bfloat16 and float32: correlation of heatmaps", case, maps, "", ">= 0.98"),
        difference("bfloat16 minus float32: insertion AUC, patch", case, apart),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--out", default="runs/benchmarks")
    asked = parser.parse_args()
    study = Study(out=asked.out, clips=asked.clips)
    record("precision", [one for cell in CELLS for one in compared(study, *cell)])


if __name__ == "__main__":
    main()
