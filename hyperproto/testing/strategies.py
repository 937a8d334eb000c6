"""Strategies of hypothesis: small banks, heads, embeddings and labels, quick enough for a hundred examples."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from hyperproto.arguments import whole_number
from hyperproto.bank import PrototypeBank
from hyperproto.head import HypersphericalHead
from hyperproto.testing.bank_checks import SMALLEST_DISTANCE
from hyperproto.testing.requirements import unit_rows

#: Seeds of generators.
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def banks(draw: st.DrawFn, *, min_prototypes: int = 2, max_prototypes: int = 12, max_dim: int = 8) -> PrototypeBank:
    """Banks of any shape in the given range that pass `check_bank`: by closed forms, at random, or from given rows.

    Args:
        draw: given by hypothesis.
        min_prototypes: smallest P, 2 or more.
        max_prototypes: largest P.
        max_dim: largest D; the smallest is 2.
    """
    min_prototypes = whole_number(min_prototypes, "min_prototypes", smallest=2)
    max_prototypes = whole_number(max_prototypes, "max_prototypes", smallest=min_prototypes)
    max_dim = whole_number(max_dim, "max_dim", smallest=2)
    num_prototypes = draw(st.integers(min_prototypes, max_prototypes))
    dim = draw(st.integers(2, max_dim))
    seed = draw(SEEDS)
    method = draw(st.sampled_from(["random", "given", "closed form"]))
    if method == "closed form" and num_prototypes <= 2 * dim:
        return PrototypeBank(num_prototypes, dim, seed=seed)
    if method == "given":
        bank = PrototypeBank.from_tensor(3.0 * unit_rows(num_prototypes, dim, seed))
    else:
        bank = PrototypeBank(num_prototypes, dim, method="random", seed=seed)
    # Random prototypes on a circle may come as near to each other as equal ones.
    assume(float(torch.pdist(bank.prototypes.double()).min()) > SMALLEST_DISTANCE)
    return bank


@st.composite
def embeddings(draw: st.DrawFn, dim: int, *, min_size: int = 0, max_size: int = 16) -> Tensor:
    """(B, dim) float32 unit rows."""
    dim, min_size = whole_number(dim, "dim", smallest=1), whole_number(min_size, "min_size")
    max_size = whole_number(max_size, "max_size", smallest=min_size)
    return unit_rows(draw(st.integers(min_size, max_size)), dim, draw(SEEDS))


@st.composite
def label_streams(draw: st.DrawFn, num_classes: int, *, max_batches: int = 5, max_batch_size: int = 8) -> list[Tensor]:
    """Lists of label batches (B,) int64 of differing sizes, empty ones and single samples among them."""
    max_batches = whole_number(max_batches, "max_batches")
    max_batch_size = whole_number(max_batch_size, "max_batch_size")
    labels = st.integers(0, whole_number(num_classes, "num_classes", smallest=1) - 1)
    batches = draw(st.lists(st.lists(labels, max_size=max_batch_size), max_size=max_batches))
    return [torch.tensor(batch, dtype=torch.int64) for batch in batches]


@st.composite
def heads(draw: st.DrawFn, *, max_classes: int = 7, max_spare: int = 3, max_dim: int = 6) -> HypersphericalHead:
    """Heads with P >= C prototypes and a random assignment, without projection ("none")."""
    max_dim = whole_number(max_dim, "max_dim", smallest=2)
    num_classes = draw(st.integers(2, whole_number(max_classes, "max_classes", smallest=2)))
    num_prototypes = num_classes + draw(st.integers(0, whole_number(max_spare, "max_spare")))
    bank = draw(banks(min_prototypes=num_prototypes, max_prototypes=num_prototypes, max_dim=max_dim))
    head = HypersphericalHead(bank.dim, num_classes, bank=bank, projection="none")
    order = draw(st.permutations(range(num_prototypes)))
    head.assign_(torch.tensor(order[:num_classes]))
    return head
