"""What makes an assignment valid."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import AssignmentError


def check_assignment(assignment: Tensor, num_classes: int, num_prototypes: int) -> None:
    """Raise unless `assignment` is an injective map from C labels into P prototypes.

    Raises:
        AssignmentError: another shape or dtype, a value out of range, or a value twice.
    """
    if assignment.shape != (num_classes,) or assignment.dtype != torch.int64:
        raise AssignmentError(
            f"expected an assignment of shape ({num_classes},) and dtype torch.int64, got "
            f"{tuple(assignment.shape)} and {assignment.dtype}."
        )
    uses = torch.zeros(num_prototypes, dtype=torch.int64, device=assignment.device)
    smallest, largest = int(assignment.min()), int(assignment.max())
    if smallest < 0 or largest >= num_prototypes:
        raise AssignmentError(
            f"an assignment to {num_prototypes} prototypes needs values in [0, {num_prototypes - 1}], "
            f"got values from {smallest} to {largest}."
        )
    uses.index_add_(0, assignment, torch.ones_like(assignment))
    if int(uses.max()) > 1:
        shared = torch.nonzero(uses > 1).flatten()[:5].tolist()
        raise AssignmentError(f"each prototype can stand for one label only; used more than once: {shared}.")
