"""Heads on the features of a pretrained backbone that stays as it is: what each is worth, image for image.

    python experiments/frozen.py FEATURES.npz --images 50 20 200 500 --threads 1

FEATURES.npz is what pretrained.py writes. Of each class of CIFAR-100 a head gets so many images, drawn anew for each
seed, and the whole test set judges it. What has to be chosen (penalty, smoothing, learning rate, scale) is chosen on a
tenth of them that is held out, and the head then fitted to all: hyperproto's fits do so themselves, and the others are
given the same here. A line for each head goes to results/frozen.jsonl as it comes; lines that are there are not made
again. "minus_full" and "minus_peer" are differences in accuracy on the same test images, to softmax on all features and
to softmax of the same rank, and the standard errors beside them those of paired differences.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cifar100
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

import hyperproto

RESULTS = Path(__file__).parent / "results/frozen.jsonl"
SEEDS, DIMS, NUM_CLASSES = (0, 1, 2), (100, 50, 25, 10), 100

#: Penalties of softmax, each from where the one before has led, until one does worse; smoothing is tried at the best.
PENALTIES, SMOOTHING = tuple(0.1 * 0.5**k for k in range(12)), 0.1
#: Of what is trained by AdamW, with a cosine schedule; beyond these rates in factors of three while the last is best.
RATES, EPOCHS, BATCH_SIZE, WEIGHT_DECAY = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 10, 128, 0.05
#: What training may begin with.
STARTS = {
    "class vectors": "trained from class vectors",
    "nothing": "published pull",
    "data": "published pull from fit_head",
}


class Data(NamedTuple):
    """Features (N, F) and labels (N,) to fit to, of which the places in `held_out` (M,) choose; and the test set's."""

    features: Tensor
    labels: Tensor
    held_out: Tensor
    test_features: Tensor
    test_labels: Tensor

    def without_held_out(self) -> tuple[Tensor, Tensor]:
        """Features and labels of the others."""
        others = torch.ones(len(self.labels), dtype=torch.bool)
        others[self.held_out] = False
        return self.features[others], self.labels[others]


def draw(arrays: dict[str, np.ndarray], images: int, seed: int) -> Data:
    """So many images of each class, the first tenth of which is held out."""
    generator = np.random.default_rng((images, seed))
    places = [generator.permutation(np.flatnonzero(arrays["y_train"] == c))[:images] for c in range(NUM_CLASSES)]
    chosen = np.concatenate(places)
    held_out = np.arange(len(chosen)).reshape(NUM_CLASSES, images)[:, : images // 10].ravel()
    parts = (arrays["x_train"][chosen], arrays["y_train"][chosen], held_out, arrays["x_test"], arrays["y_test"])
    return Data(*map(torch.from_numpy, parts))


# ---- softmax --------------------------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Softmax on standardised features, of full rank or as two factors; every parameter is penalised."""

    def __init__(self, like: Tensor, dim: int | None, seed: int) -> None:
        super().__init__()
        self.register_buffer("centre", like.mean(dim=0))
        self.register_buffer("spread", (like - self.centre).square().mean().sqrt())
        width = like.shape[1]
        self.first = nn.Linear(width, dim, bias=False) if dim else nn.Identity()
        self.last = nn.Linear(dim or width, NUM_CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1 / width**0.5 if dim else 0.0, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        return self.last(self.first((features - self.centre) / self.spread))

    def fit(self, features: Tensor, labels: Tensor, *, penalty: float, smoothing: float, iterations: int) -> None:
        """L-BFGS from where it is."""
        parameters = list(self.parameters())
        optimizer = torch.optim.LBFGS(parameters, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self(features), labels, label_smoothing=smoothing)
            loss = loss + 0.5 * penalty * sum(parameter.square().sum() for parameter in parameters)
            loss.backward()
            return loss

        optimizer.step(evaluate)


def fitted_softmax(data: Data, dim: int | None, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Softmax whose penalty, smoothing and temperature suit the held-out images best, fitted to all."""
    best: tuple[float, dict[str, Tensor], dict[str, float]] | None = None
    features, labels = data.without_held_out()
    held_out, held_out_labels = data.features[data.held_out], data.labels[data.held_out]
    model = Softmax(data.features, dim, seed)

    def attempt(penalty: float, smoothing: float) -> bool:
        nonlocal best
        model.fit(features, labels, penalty=penalty, smoothing=smoothing, iterations=40)
        with torch.no_grad():
            scale, loss = best_temperature(model(held_out), held_out_labels)
        if best is not None and loss >= best[0]:
            return False
        state = {name: value.clone() for name, value in model.state_dict().items()}
        best = (loss, state, {"penalty": penalty, "smoothing": smoothing, "scale": scale})
        return True

    for penalty in PENALTIES:
        if not attempt(penalty, 0.0):
            break
    assert best is not None
    penalty = best[2]["penalty"]
    for factor in (1.0, 0.5):
        model.load_state_dict(best[1])
        attempt(factor * penalty, SMOOTHING)
    model.load_state_dict(best[1])
    chosen = best[2]
    model.fit(data.features, data.labels, penalty=chosen["penalty"], smoothing=chosen["smoothing"], iterations=80)
    return Scaled(model, chosen["scale"]), chosen


class Scaled(nn.Module):
    """A model whose logits are multiplied by a number."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        return self.scale * self.model(features)


def best_temperature(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The factor with which logits make labels likeliest, and their mean negative log-likelihood then."""
    losses = {scale: float(F.cross_entropy(scale * logits, labels)) for scale in np.geomspace(0.1, 10.0, 61)}
    scale = min(losses, key=lambda each: losses[each])
    return float(scale), losses[scale]


def cut(softmax: Scaled, data: Data, dim: int) -> nn.Module:
    """Softmax's logits, less their mean, in their leading principal components."""
    with torch.no_grad():
        logits = softmax(data.features)
        logits -= logits.mean(dim=1, keepdim=True)
        mean = logits.mean(dim=0)
        leading = torch.linalg.svd(logits - mean, full_matrices=False)[2][:dim]  # (D, C)
    return Composed(softmax, lambda rows: (rows - mean) @ leading.T @ leading + mean)


class Composed(nn.Module):
    """A model and a function of its output."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        return self.function(self.model(features))


# ---- hyperproto -----------------------------------------------------------------------------------------------------


def started(start: str, features: Tensor, labels: Tensor, dim: int) -> nn.Module:
    """A head on the features, as a model with nothing before it, fitted to them or not."""
    model = nn.Sequential(nn.Linear(features.shape[1], NUM_CLASSES))
    hyperproto.convert_model(model, classifier="0", dim=dim)
    if start != "nothing":
        hyperproto.fit_head(model, (features, labels), bank="class-vectors" if start == "class vectors" else None)
    return model.eval()


def warm_started(softmax: Scaled, data: Data, dim: int) -> nn.Module:
    """A head that starts from softmax as it stands."""
    probe: Any = softmax.model
    layer = nn.Linear(data.features.shape[1], NUM_CLASSES)
    with torch.no_grad():
        layer.weight.copy_(probe.last.weight / probe.spread)
        layer.bias.copy_(probe.last.bias - layer.weight @ probe.centre)
    return hyperproto.convert_model(nn.Sequential(layer), classifier="0", dim=dim, warm_start=True).eval()


def trained(data: Data, dim: int, seed: int, start: str) -> tuple[nn.Module, dict[str, float]]:
    """A loop like the README's first one under AdamW, whose rate suits the held-out images best."""

    def train(begun: nn.Module, features: Tensor, labels: Tensor, rate: float) -> nn.Module:
        torch.manual_seed(seed)
        model = copy.deepcopy(begun)
        assigner = hyperproto.DynamicAssigner(model)
        make = hyperproto.PrototypeCrossEntropyLoss if start == "class vectors" else hyperproto.BalancedLoss
        criterion = make(assigner)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * (len(labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(EPOCHS):
            for places in torch.randperm(len(labels))[: len(labels) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                criterion(model(features[places]), labels[places]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            assigner.step()
        return model.eval()

    found: dict[float, tuple[float, float]] = {}
    samples = data.without_held_out()
    begun = started(start, *samples, dim)
    untried = list(RATES)
    while untried:
        rate = untried.pop(0)
        model = train(begun, *samples, rate)
        hyperproto.fit_logit_scale(model, (data.features[data.held_out], data.labels[data.held_out]))
        [head] = hyperproto.get_heads(model).values()
        with torch.no_grad():
            logits = model(data.features[data.held_out])
        right = (logits.argmax(dim=1) == data.labels[data.held_out]).float().mean()
        found[rate] = float(right), float(head.logit_scale)
        best = max(found, key=lambda each: found[each][0])
        if not untried and best in (min(found), max(found)):
            untried.append(best / 3 if best == min(found) else best * 3)
    rate = best
    samples = data.features, data.labels
    model = train(started(start, *samples, dim), *samples, rate)
    [head] = hyperproto.get_heads(model).values()
    head.logit_scale.fill_(found[rate][1])
    return model, {"rate": rate, "scale": found[rate][1]}


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(data: Data, seed: int) -> Iterator[tuple[str, int, Callable[[], tuple[nn.Module, dict[str, Any]]]]]:
    """Name, dimension and fit of each head; those that others are compared with come first."""
    loader = (data.features, data.labels)
    found: dict[str, Scaled] = {}

    def full() -> tuple[nn.Module, dict[str, Any]]:
        found["full"], chosen = fitted_softmax(data, None, seed)
        return found["full"], chosen

    def fitted(model: nn.Module, fit: Callable[..., hyperproto.HeadFit], **options: Any) -> tuple[nn.Module, dict]:
        report = fit(model, loader, **options)
        held_out = {} if report.held_out is None else vars(report.held_out)
        return model.eval(), held_out

    yield "softmax", NUM_CLASSES, full
    for dim in DIMS:
        if dim < NUM_CLASSES:
            yield "softmax of rank D", dim, lambda dim=dim: fitted_softmax(data, dim, seed)
            yield "softmax's logits cut to D components", dim, lambda dim=dim: (cut(found["full"], data, dim), {})
            yield (
                "class vectors",
                dim,
                lambda dim=dim: fitted(started("nothing", *loader, dim), hyperproto.fit_head, bank="class-vectors"),
            )
        yield "fit_head", dim, lambda dim=dim: (started("data", *loader, dim), {})
        yield (
            "fit_head, then refit_head",
            dim,
            lambda dim=dim: fitted(started("data", *loader, dim), hyperproto.refit_head),
        )
        yield "warm start from softmax", dim, lambda dim=dim: (warm_started(found["full"], data, dim), {})
    for start, name in STARTS.items():
        for dim in DIMS:
            if dim < NUM_CLASSES or start != "class vectors":
                yield name, dim, lambda dim=dim, start=start: trained(data, dim, seed, start)


def compared(right: Tensor, other: Tensor | None) -> list[float] | None:
    """Difference in accuracy on the same images, in per cent, and its standard error."""
    if other is None:
        return None
    differences = 100.0 * (right.float() - other.float())
    return [float(differences.mean()), float(differences.std() / len(differences) ** 0.5)]


def work(data: Data, images: int, seed: int, known: set[tuple[Any, ...]]) -> None:
    """All rows of one draw that are missing."""
    listed = {("frozen", images, seed, name, dim) for name, dim, _ in rows(data, seed)}
    if listed <= known:
        return
    right_of: dict[tuple[str, int], Tensor] = {}
    for name, dim, fit in rows(data, seed):
        is_peer = name.startswith("softmax") and "cut" not in name
        key = ("frozen", images, seed, name, dim)
        if key in known and not is_peer:
            continue
        started = time.perf_counter()
        model, chosen = fit()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            logits = model.eval()(data.test_features)
        right = right_of[name, dim] = logits.argmax(dim=1) == data.test_labels
        if key in known:
            continue
        error = multiclass_calibration_error(logits.softmax(dim=1), data.test_labels, NUM_CLASSES, n_bins=15)
        line = {
            "regime": "frozen",
            "images": images,
            "seed": seed,
            "method": name,
            "dim": dim,
            "top1": 100.0 * float(right.float().mean()),
            "minus_full": compared(right, right_of.get(("softmax", NUM_CLASSES))),
            "minus_peer": compared(right, right_of.get(("softmax of rank D", dim), right_of["softmax", NUM_CLASSES])),
            "log_loss": float(F.cross_entropy(logits, data.test_labels)),
            "calibration_error": 100.0 * float(error),
            "seconds": seconds,
            "chosen": chosen,
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{images} images, seed {seed}, D = {dim}, {name}: {line['top1']:.2f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Work through the draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, metavar="FEATURES.npz")
    parser.add_argument("--images", type=int, nargs="+", default=(50, 20, 200, 500), help="of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with np.load(arguments.features) as file:
        arrays = dict(file)
    lines = cifar100.results_of("frozen")
    known = {tuple(line[key] for key in ("regime", "images", "seed", "method", "dim")) for line in lines}
    for images in arguments.images:
        for seed in arguments.seeds:
            work(draw(arrays, images, seed), images, seed, known)


if __name__ == "__main__":
    main()
