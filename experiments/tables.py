"""Writes the tables of the result pages in docs/ and those of README.md from the lines in experiments/results/.

    python experiments/tables.py

Every figure is of the last epoch; n runs with other seeds give mean and standard deviation, and one run stands alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cifar100
import finetune
import numpy as np
import rematching
import scale as scale_grid

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/results.md"
PRETRAINED = ROOT / "docs/results_pretrained.md"
SCRATCH = ROOT / "docs/results_scratch.md"
SCALES = ROOT / "docs/training.md"
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

#: Regimes of the README's first table.
SHORT_REGIMES = ("frozen, 50 images a class", f"fine-tuned, {finetune.TRAINED} images a class")

#: Columns of the tables of frozen features, by the names in their lines.
FROZEN = (
    "softmax",
    "softmax of rank D",
    "class vectors",
    "fit_head",
    "fit_head, then refit_head",
    "warm start from softmax",
    "softmax's logits cut to D components",
    "trained from class vectors",
    "published pull from fit_head",
    "published pull",
)

#: Columns of the first table: softmax on all features, and three heads of D dimensions.
COLUMNS = ("softmax, all features", "softmax of rank D", "class vectors, trained on", "class vectors, fitted")
DIMS = (50, 25, 10)

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


def scale_table(suite: str) -> str:
    """Of each scale and dimension the accuracy at the best learning rate, and that rate."""
    found: dict[tuple[float | str, int], dict[float, float]] = defaultdict(dict)
    for line in cifar100.results_of("scale"):
        if line["suite"] == suite and line["seed"] == 0:
            found[line["scale"], line["dim"]][line["rate"]] = line["top1"]
    found["default", cifar100.NUM_CLASSES] = found[9.1, cifar100.NUM_CLASSES]
    given = sorted(scale for scale in scale_grid.SCALES if isinstance(scale, float))
    rows = [["scale", *(f"D = {dim}" for dim in scale_grid.DIMS)], ["---"] * (1 + len(scale_grid.DIMS))]
    for scale in (*given, "default", "learned"):
        cells = [scale if isinstance(scale, str) else f"{scale:g}"]
        for dim in scale_grid.DIMS:
            accuracies = found[scale, dim]
            best = max(accuracies, key=lambda rate: accuracies[rate], default=None)
            cells.append("-" if best is None else f"{accuracies[best]:.1f} ({best:g})")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def scale_seeds_table() -> str:
    """What is near the default from scratch, over seeds."""
    rows = [["D", "scale", "rate", "n", "accuracy"], ["---"] * 5]
    for scale, rate, dim in scale_grid.NEAR:
        run = {"suite": "scratch", "scale": scale, "rate": rate, "dim": dim}
        lines = [line for line in cifar100.results_of("scale") if run.items() <= line.items()]
        rows.append([str(dim), str(scale), f"{rate:g}", str(len(lines)), shown(lines, "top1")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def finetuned_table() -> str:
    """One row for each method and dimension, with the difference to full softmax on the same test images."""
    found = {
        cell: {line["seed"]: line for line in lines}
        for cell, lines in finetune.chosen(cifar100.results_of("finetune")).items()
    }
    peers = found[finetune.WIDE[0], None]
    header = ["D", "method", "rate", "n", "before training", "accuracy", "minus full softmax"]
    header += ["calibration by likelihood", "by confidence"]
    keys = ("start_top1", "top1", "calibration_error_fitted", "calibration_error_matched")
    rows = [header, ["---"] * len(header)]
    for dim, methods in ((None, finetune.WIDE), *((dim, finetune.NARROW) for dim in finetune.DIMS)):
        for method in methods:
            lines = found.get((method, dim), {})
            if not lines:
                continue
            rate = f"{lines[finetune.SEEDS[0]]['rate']:.1e}"
            figures = [shown(list(lines.values()), key) for key in keys]
            gap = difference([(peers[seed], lines[seed]) for seed in lines if seed in peers and lines != peers])
            rows.append([str(dim or 1280), method, rate, str(len(lines)), *figures[:2], gap, *figures[2:]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """By how much the second of each pair of result lines is the more accurate, and the standard error of that.

    The error is that of test images drawn anew, which each pair has in common.
    """
    if not pairs:
        return "-"
    both = np.array([[correct_images(line) for line in pair] for pair in pairs], dtype=float)  # (pairs, 2, images)
    gaps = (both[:, 1] - both[:, 0]).mean(axis=0)
    return f"{100 * gaps.mean():+.1f} ± {100 * gaps.std() / math.sqrt(len(gaps)):.1f}"


def correct_images(line: dict[str, Any]) -> np.ndarray:
    """(images,) of 0 and 1: which test images a run was right on."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(line["correct"]), dtype=np.uint8))


def frozen_table(key: str, methods: tuple[str, ...]) -> str:
    """A figure of heads on frozen features: one row for each number of images and dimension, one column a method."""
    lines = cifar100.results_of("frozen")
    rows = [["D", "images a class", "n", *methods], ["---"] * (3 + len(methods))]
    for images in sorted({line["images"] for line in lines}):
        for dim in sorted({line["dim"] for line in lines}, reverse=True):
            cells = {
                method: [
                    line for line in lines if (line["images"], line["dim"], line["method"]) == (images, dim, method)
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
    lines = [line for line in cifar100.results_of("frozen") if line["method"] == method]
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


def overview() -> Iterator[tuple[str, int, list[list[dict[str, Any]]]]]:
    """Regime, dimension, and the result lines of each column of the first table."""
    frozen: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for line in cifar100.results_of("frozen"):
        frozen[line["images"], line["method"], line["dim"]].append(line)
    for images in sorted({images for images, *_ in frozen}):
        for dim in DIMS:
            names = ("softmax of rank D", "trained from class vectors", "class vectors")
            own = [frozen[images, name, dim] for name in names]
            yield f"frozen, {images} images a class", dim, [frozen[images, "softmax", 100], *own]
    tuned = finetune.chosen(cifar100.results_of("finetune"))
    for dim in DIMS:
        own = [tuned[finetune.NARROW[1], dim], tuned[finetune.NARROW[0], dim]]
        yield f"fine-tuned, {finetune.TRAINED} images a class", dim, [tuned[finetune.WIDE[0], None], *own, []]
    scratch = collect("balanced")
    for dim in DIMS:
        softmax = scratch["softmax at D = 100, then softmax at D", dim]
        fitted = scratch["simplex, then class-vector prototypes", dim]
        yield "from scratch, 200 images a class", dim, [scratch["softmax, refitted", 100], softmax, [], fitted]


def overview_table(regimes: tuple[str, ...] | None = None) -> str:
    """Accuracies of the first table, or of some of its regimes."""
    rows = [["regime", "D", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for regime, dim, cells in overview():
        if regimes is None or regime in regimes:
            rows.append([regime, str(dim), *(shown(lines, "top1") if lines else "-" for lines in cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def calibration_table() -> str:
    """Calibration error and log-loss of each way to fit the temperature."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in cifar100.results_of("calibration"):
        found[line["dim"], line["images"]].append(line)
    ways = ("likelihood", "confidence", "power")
    names = [f"{way}: {figure}" for way in ways for figure in ("error", "log-loss")]
    rows = [["D", "images a class", "n", *names, "p"], ["---"] * (4 + len(names))]
    for (dim, images), lines in sorted(found.items(), reverse=True):
        cells = [str(dim), str(images), str(len(lines))]
        for way in ways:
            cells.append(shown([line[way] for line in lines], "calibration_error"))
            cells.append(f"{mean(line[way]['log_loss'] for line in lines):.3f}")
        rows.append([*cells, f"{mean(line['power']['chosen'] for line in lines):.2f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def rematching_table() -> str:
    """Accuracy of each way to end an epoch."""
    found: dict[tuple[str, str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in cifar100.results_of("rematching"):
        found[line["suite"], line["loss"], line["dim"]][line["way"]].append(line)
    rows = [["suite", "loss", "D", *rematching.WAYS], ["---"] * (3 + len(rematching.WAYS))]
    for (suite, loss, dim), ways in found.items():
        cells = [shown(ways[way], "top1") if ways[way] else "-" for way in rematching.WAYS]
        rows.append([suite, loss, str(dim), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands in a file between a mark and the next `<!-- end -->`."""
    before, rest = path.read_text().split(f"<!-- {mark} -->\n")
    path.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}")


def main() -> None:
    """Put the table of each suite that has results between its marks, and the short ones."""
    put(PAGE, "overview", overview_table())
    for suite in filter(cifar100.results_of, cifar100.METHODS):
        put(SCRATCH, suite, table(suite))
    for suite in ("scratch", "frozen"):
        put(SCALES, suite, scale_table(suite))
    put(SCALES, "seeds", scale_seeds_table())
    put(PRETRAINED, "finetuned", finetuned_table())
    put(PRETRAINED, "frozen", frozen_table("top1", FROZEN))
    put(PRETRAINED, "frozen calibration", frozen_table("calibration_error", FROZEN[:5]))
    for method in ("class vectors", "trained from class vectors"):
        put(PRETRAINED, f"{method}, peer", differences(method, "minus_peer"))
        put(PRETRAINED, f"{method}, full", differences(method, "minus_full"))
    put(PRETRAINED, "calibration", calibration_table())
    put(PRETRAINED, "rematching", rematching_table())
    put(README, "pretrained", overview_table(SHORT_REGIMES))
    for suite in SHORT:
        put(README, suite, short_table(suite))


if __name__ == "__main__":
    main()
