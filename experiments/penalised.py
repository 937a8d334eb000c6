"""Softmax that cannot overfit, as the peer of fixed prototypes: L2 on its class vectors, chosen on held-out samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Of half the squared lengths, beside the mean cross-entropy of features with unit variance, the strongest first.
PENALTIES = tuple(10.0 ** (-exponent / 2) for exponent in range(2, 10))


@dataclass
class Probe:
    """Logits second @ (first @ x + offset) + bias of features x (F,); first is None for as many dimensions as x has.

    Attributes:
        first: (D, F), or None.
        offset: (D,), or None.
        second: (C, D) or (C, F).
        bias: (C,).
        penalty: that was chosen.
    """

    first: Tensor | None
    offset: Tensor | None
    second: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, C)."""
        rows = features if self.first is None else features @ self.first.T + self.offset
        return rows @ self.second.T + self.bias


def fit_probe(features: dict[str, tuple[Tensor, Tensor]], *, dim: int | None, iterations: int = 100) -> Probe:
    """The penalised softmax with the largest likelihood on held-out samples.

    Args:
        features: (N, F) and labels (N,), "fit" and "held_out".
        dim: D, of a product of two factors that are both penalised; None: no bottleneck.
        iterations: at most so many of L-BFGS for each penalty; each starts where the one before ended.
    """
    rows, labels = features["fit"]
    mean, deviation = rows.mean(dim=0), rows.std(dim=0).square().mean().sqrt()
    standard = (rows - mean) / deviation
    num_classes, generator = int(labels.max()) + 1, torch.Generator().manual_seed(0)
    shapes = [(num_classes, rows.shape[1])] if dim is None else [(num_classes, dim), (dim, rows.shape[1])]
    factors = [torch.randn(shape, generator=generator) / math.sqrt(4 * shape[1]) for shape in shapes]
    if dim is None:
        factors[0].zero_()
    parameters = [factor.requires_grad_(True) for factor in factors] + [torch.zeros(num_classes, requires_grad=True)]
    best, lowest = None, math.inf
    for penalty in PENALTIES:
        _minimise(parameters, standard, labels, penalty, iterations)
        second, *first, bias = (parameter.detach().clone() for parameter in parameters)
        if first:
            [matrix] = first
            probe = Probe(matrix / deviation, -(matrix @ mean) / deviation, second, bias, penalty)
        else:
            probe = Probe(None, None, second / deviation, bias - second @ mean / deviation, penalty)
        held_out, truth = features["held_out"]
        loss = float(F.cross_entropy(probe(held_out), truth))
        if loss < lowest:
            best, lowest = probe, loss
    return best


def _minimise(parameters: list[Tensor], rows: Tensor, labels: Tensor, penalty: float, iterations: int) -> None:
    *factors, bias = parameters
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-7, history_size=10
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        logits = rows
        for factor in reversed(factors):
            logits = logits @ factor.T
        loss = F.cross_entropy(logits + bias, labels)
        loss = loss + 0.5 * penalty * sum(factor.square().sum() for factor in factors)
        loss.backward()
        return loss.detach()

    optimizer.step(evaluate)
