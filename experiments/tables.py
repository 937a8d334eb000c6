"""Writes the tables of docs/results.md and the short ones of README.md from the result lines in experiments/results/.

    python experiments/tables.py

Every figure is of the last epoch; n runs with other seeds give mean and standard deviation, and one run stands alone.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cifar100

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
README = ROOT / "README.md"

#: Rows of the short tables, by suite: method, dimension, what it says.
SHORT = {
    "balanced": (
        (
            "simplex, then class-vector prototypes",
            50,
            "**simplex in training, then prototypes in D dimensions (recipe)**",
        ),
        ("softmax", 50, "softmax behind a bottleneck"),
        ("softmax, refitted", 50, "the same, refitted to the features at the end"),
        ("softmax at D = 100, then softmax at D", 50, "softmax trained at D = 100, refitted in D dimensions"),
        ("simplex, refitted", 100, "**simplex, refitted (recipe)**"),
        ("softmax, refitted", 100, "softmax, refitted"),
        ("DL2PA [1]", 50, "DL2PA with the published loss and matching"),
    ),
    "long-tail": (
        ("simplex at the end", 100, "**softmax in training, then a simplex fitted to the features**"),
        ("softmax", 100, "softmax"),
        ("softmax, refitted", 100, "softmax, refitted to the features"),
        ("ETF + dot regression [2]", 100, "simplex from the first step on, dot regression"),
    ),
}

#: Columns of the tables of frozen features, by the names in their lines.
FROZEN = (
    "softmax",
    "softmax of rank D",
    "class vectors",
    "fit_head",
    "fit_head, then refit_head",
    "warm start from softmax",
    "softmax's logits cut to D components",
    "three lines",
    "three lines from fit_head",
    "three lines from class vectors",
)

#: Column of the tables, key of the result lines.
FIGURES = {
    "accuracy": "top1",
    "adjusted": "top1_adjusted",
    "head": "head_accuracy",
    "median": "median_accuracy",
    "tail": "tail_accuracy",
    "top 5": "top5",
    "calibration error": "calibration_error",
    "after fitting": "calibration_error_fitted",
}
#: Those of the long-tailed tables alone.
GROUPS = ("adjusted", "head", "median", "tail")
#: The same of the table of costs.
COSTS = {"seconds an epoch": "seconds", "seconds to fit the head at the end": "fit_seconds", "MiB": "peak_memory_mib"}


def collect(suite: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Result lines by method and dimension, in the order of the suite; those of no run of the suite are left out."""
    results = cifar100.results_of(suite)
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for method, flags in cifar100.runs(suite):
        arguments = cifar100.arguments_of(flags)
        found[method, arguments.get("final_dim", arguments["dim"])] += [
            r for r in results if cifar100.deciding(r["arguments"]) == arguments
        ]
    return {key: lines for key, lines in found.items() if lines}


def shown(lines: list[dict[str, Any]], key: str) -> str:
    """Mean and standard deviation of a figure."""
    values = [line.get(key) for line in lines]
    if any(value is None for value in values):
        return "-"
    return f"{values[0]:.1f}" if len(values) == 1 else f"{mean(values):.1f} ± {stdev(values):.1f}"


def table(suite: str) -> str:
    """One row for each method and dimension that has results."""
    groups = suite in ("long-tail", "published", "quarter")
    figures = {name: key for name, key in FIGURES.items() if groups or name not in GROUPS}
    names = COSTS if suite == "cost" else figures
    header = ["D", "method", "n", *names]
    rows = []
    for (method, dim), lines in sorted(collect(suite).items(), key=lambda item: -item[0][1]):
        rows.append([str(dim), method, str(len(lines)), *(shown(lines, key) for key in names.values())])
    text = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(text)


def short_table(suite: str) -> str:
    """Accuracies of the most telling rows."""
    found = collect(suite)
    rows = [["D", "head", "accuracy", "seeds"], ["---"] * 4]
    for method, dim, label in SHORT[suite]:
        lines = found[method, dim]
        rows.append([str(dim), label, shown(lines, "top1"), str(len(lines))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def frozen_lines() -> list[dict[str, Any]]:
    """Result lines of frozen.py."""
    path = Path(__file__).parent / "results/frozen.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def frozen_table(key: str, methods: tuple[str, ...]) -> str:
    """A figure of heads on frozen features: one row for each number of images and dimension, one column a method."""
    lines = frozen_lines()
    rows = [["D", "images a class", "n", *methods], ["---"] * (3 + len(methods))]
    for images in sorted({line["images"] for line in lines}):
        for dim in sorted({line["dim"] for line in lines}, reverse=True):
            cells = {
                method: [
                    line for line in lines if [line[k] for k in ("images", "dim", "method")] == [images, dim, method]
                ]
                for method in methods
            }
            number = max(len(found) for found in cells.values())
            if number:
                values = (shown(found, key) if len(found) == number else "-" for found in cells.values())
                rows.append([str(dim), str(images), str(number), *values])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def differences(method: str, key: str) -> str:
    """Mean difference of a method to what `key` says, with its standard error, for each number of images and D."""
    lines = [line for line in frozen_lines() if line["method"] == method]
    rows = [["D", "images a class", "n", "difference", "standard error"], ["---"] * 5]
    for images in sorted({line["images"] for line in lines}):
        for dim in sorted({line["dim"] for line in lines}, reverse=True):
            pairs = [line[key] for line in lines if (line["images"], line["dim"]) == (images, dim)]
            if pairs:
                # The test images are the same for all seeds: their errors do not average out.
                error = mean(error for _, error in pairs)
                cells = (dim, images, len(pairs), f"{mean(gap for gap, _ in pairs):+.1f}", f"{error:.1f}")
                rows.append([str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands in a file between a mark and the next `<!-- end -->`."""
    before, rest = path.read_text().split(f"<!-- {mark} -->\n")
    path.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}")


def main() -> None:
    """Put the table of each suite that has results between its marks, and the short ones."""
    for suite in filter(cifar100.results_of, cifar100.METHODS):
        put(PAGE, suite, table(suite))
    put(PAGE, "frozen", frozen_table("top1", FROZEN))
    put(PAGE, "frozen calibration", frozen_table("calibration_error", FROZEN[:5]))
    put(PAGE, "frozen peer", differences("class vectors", "minus_peer"))
    put(PAGE, "frozen full", differences("class vectors", "minus_full"))
    for suite in SHORT:
        put(README, suite, short_table(suite))


if __name__ == "__main__":
    main()
