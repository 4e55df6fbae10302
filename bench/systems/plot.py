"""Two plots from the JSON on stdin: python -m systems.plot FOLDER

{"decode": {SYSTEM: [[CONTEXT, MEDIAN, LEAST, MOST], ...]}, "prefill": the same by the length of the prompt},
in milliseconds a token and in tokens a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

AXES = {
    "decode": ("tokens of context", "ms a token of decode (less is better)"),
    "prefill": ("tokens of prompt", "tokens a second of prefill (more is better)"),
}
OURS = "spilld"


def draw(series: Mapping[str, Sequence[Sequence[float]]], across: str, up: str, file: Path) -> None:
    """Medians as lines, with bars from the least to the most."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    for system, points in series.items():
        lengths, medians, least, most = zip(*points, strict=True)
        below = [middle - low for middle, low in zip(medians, least, strict=True)]
        above = [high - middle for middle, high in zip(medians, most, strict=True)]
        width = 2.5 if system == OURS else 1.2
        axes.errorbar(
            lengths,
            medians,
            [below, above],
            label=system,
            linewidth=width,
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({int(point[0]) for points in series.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    found = json.load(sys.stdin)
    for name, (across, up) in AXES.items():
        draw(found[name], across, up, Path(sys.argv[1]) / f"{name}.png")
