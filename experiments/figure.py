"""Draws the first table of docs/results.md, accuracy against the dimension: python experiments/figure.py."""

from itertools import groupby
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import tables

PATH = tables.ROOT / "docs/images/accuracy.png"


def draw(path: Path) -> None:
    """Write the figure."""
    regimes = [(name, list(rows)) for name, rows in groupby(tables.overview(), key=lambda row: row[0])]
    figure, panels = plt.subplots(2, (len(regimes) + 1) // 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for panel in panels.flat[len(regimes) :]:
        panel.remove()
    for (name, rows), panel in zip(regimes, panels.flat, strict=False):
        dims = [dim for _, dim, _ in rows]
        for column, (label, marker) in enumerate(zip(tables.COLUMNS, " s^o", strict=True)):
            lines = [cells[column] for *_, cells in rows]
            if not all(lines):
                continue
            heights = [mean(line["top1"] for line in own) for own in lines]
            if column == 0:
                panel.axhline(heights[0], color="black", linestyle=":", label=label)
            else:
                panel.plot(dims, heights, marker=marker, color=f"C{column}", label=label, alpha=0.8)
        panel.set(title=name, xscale="log", xticks=dims, xticklabels=map(str, dims))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("test accuracy, %")
    for panel in panels.flat[max(0, len(regimes) - panels.shape[1]) : len(regimes)]:
        panel.set_xlabel("dimension D")
        panel.tick_params(labelbottom=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(PATH)
