"""Strategies and checks with which users test their own banks, solvers, losses and training code.

Needs hypothesis (`pip install "hyperproto[test]"`); nothing else in the library imports it. Strategies draw small
objects, quick enough for a hundred examples; checks raise AssertionError with what is wrong.

Examples:
    >>> from hypothesis import given
    >>> @given(head=heads())
    ... def test_assignment_is_injective(head):
    ...     check_assignment(head)
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from hyperproto.bank import PrototypeBank
from hyperproto.errors import AssignmentError
from hyperproto.functional import solve_assignment
from hyperproto.head import HypersphericalHead
from hyperproto.losses import PrototypeLoss
from hyperproto.matching.problem import check_assignment as check_assignment_tensor
from hyperproto.sphere import normalise

#: Largest problem that `check_optimal` solves by trying every assignment.
BRUTE_FORCE_CLASSES = 7

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def banks(draw: st.DrawFn, *, min_prototypes: int = 2, max_prototypes: int = 12, max_dim: int = 8) -> PrototypeBank:
    """Banks of any shape in the given range, made by closed forms, at random, or from given rows."""
    num_prototypes = draw(st.integers(min_prototypes, max_prototypes))
    dim = draw(st.integers(2, max_dim))
    seed = draw(SEEDS)
    method = draw(st.sampled_from(["random", "given", "closed form"]))
    if method == "closed form" and num_prototypes <= 2 * dim:
        return PrototypeBank(num_prototypes, dim, seed=seed)
    if method == "given":
        return PrototypeBank.from_tensor(3.0 * _unit_rows(num_prototypes, dim, seed))
    return PrototypeBank(num_prototypes, dim, method="random", seed=seed)


@st.composite
def embeddings(draw: st.DrawFn, dim: int, *, min_size: int = 0, max_size: int = 16) -> Tensor:
    """(B, dim) float32 unit rows."""
    return _unit_rows(draw(st.integers(min_size, max_size)), dim, draw(SEEDS))


@st.composite
def label_streams(draw: st.DrawFn, num_classes: int, *, max_batches: int = 5, max_batch_size: int = 8) -> list[Tensor]:
    """Lists of label batches (B,) int64 of differing sizes, empty ones and single samples among them."""
    labels = st.integers(0, num_classes - 1)
    batches = draw(st.lists(st.lists(labels, max_size=max_batch_size), max_size=max_batches))
    return [torch.tensor(batch, dtype=torch.int64) for batch in batches]


@st.composite
def heads(draw: st.DrawFn, *, max_classes: int = 7, max_spare: int = 3, max_dim: int = 6) -> HypersphericalHead:
    """Heads with P >= C prototypes and a random assignment, without projection ("none")."""
    num_classes = draw(st.integers(2, max_classes))
    num_prototypes = num_classes + draw(st.integers(0, max_spare))
    bank = draw(banks(min_prototypes=num_prototypes, max_prototypes=num_prototypes, max_dim=max_dim))
    head = HypersphericalHead(bank.dim, num_classes, bank=bank, projection="none")
    order = draw(st.permutations(range(num_prototypes)))
    head.assign_(torch.tensor(order[:num_classes]))
    return head


def check_bank(bank: PrototypeBank) -> None:
    """Raise AssertionError unless the bank holds finite float32 unit rows that nothing trains."""
    prototypes = bank.prototypes
    _require(prototypes.dtype == torch.float32, f"prototypes must be float32, got {prototypes.dtype}")
    _require(
        prototypes.shape == (bank.num_prototypes, bank.dim),
        f"prototypes have shape {tuple(prototypes.shape)}, the bank says {(bank.num_prototypes, bank.dim)}",
    )
    _require(bool(torch.isfinite(prototypes).all()), "prototypes must be finite")
    error = float((prototypes.double().norm(dim=1) - 1.0).abs().max())
    _require(error < 1e-6, f"prototypes must have length 1, one is off by {error:.2e}")
    _require(not prototypes.requires_grad and not list(bank.parameters()), "prototypes must not train")


def check_assignment(head: HypersphericalHead) -> None:
    """Raise AssertionError unless the head's assignment is an injective map from labels to prototypes."""
    _check_injective(head.assignment, head.num_classes, head.bank.num_prototypes)


def check_optimal(assignment: Tensor, class_means: Tensor, prototypes: Tensor, *, tolerance: float = 1e-5) -> None:
    """Raise AssertionError unless it is an assignment, and none has a larger total cosine.

    Up to 7 labels and 7 prototypes every assignment is tried; beyond, scipy's dense solver is the reference.

    Args:
        assignment: (C,) int64 to be checked.
        class_means: (C, D).
        prototypes: (P, D), P >= C.
        tolerance: largest shortfall that counts as rounding.
    """
    similarity = normalise(class_means).double() @ normalise(prototypes).double().T
    _check_injective(assignment, *similarity.shape)
    reached = float(similarity.gather(1, assignment[:, None]).sum())
    num_classes, num_prototypes = similarity.shape
    if num_prototypes <= BRUTE_FORCE_CLASSES:
        rows = range(num_classes)
        table = similarity.tolist()
        best = max(
            math.fsum(table[row][column] for row, column in zip(rows, columns, strict=True))
            for columns in itertools.permutations(range(num_prototypes), num_classes)
        )
    else:
        best = solve_assignment(class_means, prototypes, method="dense").similarity
    _require(reached >= best - tolerance, f"total cosine {reached:.6f} where {best:.6f} is possible")


def check_loss(loss: PrototypeLoss) -> None:
    """Raise AssertionError unless the loss keeps what all losses of this library promise.

    Hard labels and their one-hot form agree, the per-sample losses are not negative, gradients are finite (also for
    zero embeddings and under an empty batch), and neither output nor target is changed. An assigner that the loss
    feeds is left as it was.
    """
    loss = copy.deepcopy(loss)
    head = loss.head
    embedding = head.training and head.training_output == "embedding"
    width = head.dim if embedding else head.num_classes
    rows = torch.cat([_unit_rows(5, width, seed=0), torch.zeros(1, width)])
    output = (rows if embedding else rows * head.logit_scale.cpu()).to(head.assignment.device).requires_grad_()
    labels = torch.arange(6, device=output.device) % head.num_classes
    soft = torch.nn.functional.one_hot(labels, head.num_classes).float()
    before = [tensor.detach().clone() for tensor in (output, labels, soft)]
    hard_loss, soft_loss = loss(output, labels), loss(output, soft)
    for what, tensor, old in zip(("output", "labels", "soft targets"), (output, labels, soft), before, strict=True):
        _require(torch.equal(tensor.detach(), old), f"the loss changed the {what}")
    _require(torch.allclose(hard_loss, soft_loss, atol=1e-5), "hard labels and their one-hot form disagree")
    _require(bool((hard_loss >= 0).all()), "the loss is negative")
    _require(hard_loss.shape == ((6,) if loss.reduction == "none" else ()), f"got shape {tuple(hard_loss.shape)}")
    (gradient,) = torch.autograd.grad(hard_loss.sum(), output)
    _require(bool(torch.isfinite(gradient).all()), "the gradient is not finite")
    empty = loss(output[:0], labels[:0])
    _require(bool((empty == 0).all()), "an empty batch must have loss 0")
    _require(empty.requires_grad, "an empty batch must have a gradient")
    (gradient,) = torch.autograd.grad(empty.sum(), output)
    _require(bool((gradient == 0).all()), "an empty batch must have gradient 0")


def _check_injective(assignment: Tensor, num_classes: int, num_prototypes: int) -> None:
    try:
        check_assignment_tensor(assignment, num_classes, num_prototypes)
    except AssignmentError as error:
        raise AssertionError(str(error)) from error


def _unit_rows(num_rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return normalise(torch.randn(num_rows, dim, generator=generator))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
