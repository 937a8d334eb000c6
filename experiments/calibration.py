"""How to fit the temperature: what each way makes of held-out images, on the features of a pretrained backbone.

    python experiments/calibration.py FEATURES.npz --images 50 20 200

FEATURES.npz is what pretrained.py writes. Images are drawn as by frozen.py. A head is fitted to nine tenths of them, a
temperature to the others, and another head, fitted to all, is tested with it: calibration error (15 bins) and mean
negative log-likelihood on the whole test set.

likelihood, confidence    `fit_logit_scale(match=...)`
power                     two numbers by likelihood, logits -s (1 - cos)^p; p = 1 is the first way

A line of JSON for each head goes to results/calibration.jsonl; lines that are there are not made again.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import cifar100
import frozen
import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

import hyperproto

RESULTS = Path(__file__).parent / "results/calibration.jsonl"
WAYS = ("likelihood", "confidence")


def fitted(features: Tensor, labels: Tensor, dim: int) -> tuple[torch.nn.Module, hyperproto.HypersphericalHead]:
    """A simplex refitted, or class vectors."""
    model = frozen.started("data", features, labels, frozen.NUM_CLASSES)
    if dim < frozen.NUM_CLASSES:
        hyperproto.compress_head(model, (features, labels), dim=dim)
    else:
        hyperproto.refit_head(model, (features, labels))
    [head] = hyperproto.get_heads(model).values()
    return model.eval(), head


def powered(cosines: Tensor, log_scale: float, log_power: float) -> Tensor:
    """(N, C) -> (N, C)."""
    return -math.exp(log_scale) * (1.0 - cosines).clamp_min(1e-6) ** math.exp(log_power)


@torch.no_grad()
def measure(data: frozen.Data, dim: int) -> dict[str, Any]:
    """What each way has chosen, and what becomes of it."""
    model, head = fitted(*data.without_held_out(), dim)
    held_out, truth = data.features[data.held_out], data.labels[data.held_out]
    scales = {match: hyperproto.fit_logit_scale(model, (held_out, truth), match=match) for match in WAYS}
    cosines = model(held_out) / head.logit_scale
    start = np.array([math.log(scales["likelihood"]), 0.0])
    found = minimize(lambda x: float(F.cross_entropy(powered(cosines, *x), truth)), start, method="Nelder-Mead")
    model, head = fitted(data.features, data.labels, dim)
    cosines = model(data.test_features) / head.logit_scale
    line: dict[str, Any] = {"top1": 100.0 * float((cosines.argmax(dim=1) == data.test_labels).float().mean())}
    logits = {match: scale * cosines for match, scale in scales.items()} | {"power": powered(cosines, *found.x)}
    chosen = scales | {"power": math.exp(found.x[1])}
    for way, values in logits.items():
        error = multiclass_calibration_error(values.softmax(dim=1), data.test_labels, frozen.NUM_CLASSES, n_bins=15)
        line[way] = {
            "chosen": chosen[way],
            "calibration_error": 100.0 * float(error),
            "log_loss": float(F.cross_entropy(values, data.test_labels)),
        }
    return line


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, metavar="FEATURES.npz")
    parser.add_argument("--images", type=int, nargs="+", default=[50, 20, 200], help="of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(frozen.SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with np.load(arguments.features) as file:
        arrays = dict(file)
    lines = cifar100.results_of("calibration")
    known = {(line["images"], line["seed"], line["dim"]) for line in lines}
    for images in arguments.images:
        for seed in arguments.seeds:
            data = frozen.draw(arrays, images, seed)
            for dim in frozen.DIMS:
                if (images, seed, dim) in known:
                    continue
                line = {"images": images, "seed": seed, "dim": dim, **measure(data, dim)}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
