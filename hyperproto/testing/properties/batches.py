"""Samples and batches: order, size, and what samples have to do with each other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hyperproto.functional import Reduction
from hyperproto.losses import PrototypeLoss
from hyperproto.testing.requirements import is_close, require
from hyperproto.testing.subject import Subject

REDUCTIONS: tuple[Reduction, ...] = ("none", "sum", "mean")


def reductions_belong_together(subject: Subject) -> None:
    """The sum and the mean are those of the losses that "none" returns."""
    if getattr(subject.loss, "reduction", None) is None:
        return
    batch = subject.imbalanced()
    variants = {name: _reduced(subject, name) for name in REDUCTIONS}
    if not isinstance(subject.loss, PrototypeLoss) and not _follows(variants, batch.embeddings, batch.labels):
        return  # a loss of the user's own that reads its attribute only when it is made
    for target in (batch.labels, subject.one_hot(batch.labels)):
        results = {name: variant.result(batch.embeddings, target) for name, variant in variants.items()}
        reduced: dict[Reduction, Tensor] = {"sum": results["none"].sum(), "mean": results["none"].mean()}
        for name, expected in reduced.items():
            require(
                is_close(results[name], expected),
                f'the "{name}" is {float(results[name]):.6g} where the losses of "none" give {float(expected):.6g}',
            )


def is_reduced_as_it_says(subject: Subject) -> None:
    """A batch taken twice has the same mean, twice the sum, and the same losses once more."""
    batch = subject.imbalanced()
    for target in (batch.labels, subject.one_hot(batch.labels)):
        once = subject.result(batch.embeddings, target)
        twice = subject.result(batch.embeddings.repeat(2, 1), torch.cat([target, target]))
        expected = {"mean": once, "sum": 2 * once, "none": once.repeat(2) if once.dim() else once}[subject.reduction]
        require(
            is_close(twice, expected),
            f'the loss is not the "{subject.reduction}" over samples: the same batch taken twice gives '
            f"{float(twice.sum()):.6g} where {float(expected.sum()):.6g} is right",
        )


def treats_samples_in_any_order(subject: Subject) -> None:
    """Reordering the batch reorders the losses and the gradients, and changes nothing else."""
    batch = subject.imbalanced()
    generator = torch.Generator(device="cpu").manual_seed(1)
    order = torch.randperm(len(batch), generator=generator, device="cpu").to(batch.labels.device)
    for target in (batch.labels, subject.one_hot(batch.labels)):
        _, gradient = subject.total_and_gradient(batch.embeddings, target)
        _, reordered = subject.total_and_gradient(batch.embeddings[order], target[order])
        value, after = (
            subject.result(batch.embeddings, target),
            subject.result(batch[order].embeddings, target[order]),
        )
        expected = value[order] if subject.reduction == "none" else value
        agree = is_close(after, expected) and is_close(reordered, gradient[order])
        require(agree, "the loss depends on the order of the samples")


def treats_samples_apart(subject: Subject) -> None:
    """Each sample's loss depends on its own output and label only, but for the class lengths of dot regression."""
    batch = subject.imbalanced()
    parts = batch[:1], batch[1 : len(batch) // 2], batch[len(batch) // 2 :]
    total, gradient = subject.total_and_gradient(batch.embeddings, batch.labels)
    totals, gradients = zip(*(subject.total_and_gradient(part.embeddings, part.labels) for part in parts), strict=True)
    apart = torch.cat(gradients)
    if is_close(gradient, apart):
        require(
            is_close(total, sum(totals, torch.zeros_like(total))),
            "the losses of a batch and of its parts do not add up",
        )
        return
    lengths = _dot_regression_lengths(batch.labels)[:, None]
    lengths_apart = torch.cat([_dot_regression_lengths(part.labels) for part in parts])[:, None]
    require(
        is_close(gradient / lengths, apart / lengths_apart),
        "the loss of a sample depends on the other samples of its batch",
    )


def _dot_regression_lengths(labels: Tensor) -> Tensor:
    counts = torch.bincount(labels)
    return len(labels) / (int((counts > 0).sum()) * counts[labels])


def _reduced(subject: Subject, reduction: Reduction) -> Subject:
    variant = replace(subject.copy(), reduction=reduction)
    variant.loss.reduction = reduction  # type: ignore[attr-defined]
    return variant


def _follows(variants: dict[Reduction, Subject], embeddings: Tensor, labels: Tensor) -> bool:
    shapes = {name: subject.loss(subject.output(embeddings), labels).shape for name, subject in variants.items()}
    return shapes["none"] == labels.shape and shapes["sum"] == shapes["mean"] == ()
