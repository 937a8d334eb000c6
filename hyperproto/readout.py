"""What a model returned, told once: logits or embeddings, and what the losses and class means want of it."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperproto.errors import ArgumentError, AssignmentError, ShapeError
from hyperproto.precision import full_precision
from hyperproto.sphere import assigned_cosines
from hyperproto.targets import IGNORE_INDEX, Target, can_be_looked_at, read_target, to_look_up, to_rows

#: Singular values below this share of the largest are rounding of float32.
SMALLEST_SPANNING = 1e-5

#: A sample of rows spans the space well enough if what each anchor adds to those before it is at least this long.
SMALLEST_PIVOT = 0.05

#: Cosines, and lengths of embeddings, may exceed 1 by this: two roundings of bfloat16.
ROUNDING = 0.01

#: Embeddings are this close to length 1; a batch of logits that all are would be chance.
UNIT_LENGTH = 1e-3


class Readout:
    """An output of a head whose kind is known, in rows, beside what the head was at that moment.

    Args:
        output: logits (B, C) or embeddings (B, D), or those of positions, (B, ..., C) or (B, C, ...).
        class_dim: the dimension of C or D, -1 or 1.
        is_embedding: whether it holds embeddings.
        prototypes: (P, D).
        assignment: (C,) int64.
        logit_scale: () float32.
        anchors: (A,) int64 rows of the bank, or None where embeddings cannot be recovered from logits.
        anchor_inverse: (A, D) float32, likewise.

    Attributes:
        output: (N, C) or (N, D), a row for each sample or position; so is all that follows from it.
        shape: of what has one value for each of them, (B,) or (B, ...).
    """

    def __init__(
        self,
        output: Tensor,
        class_dim: int,
        is_embedding: bool,
        prototypes: Tensor,
        assignment: Tensor,
        logit_scale: Tensor,
        anchors: Tensor | None,
        anchor_inverse: Tensor | None,
    ) -> None:
        self.output = to_rows(output, class_dim)
        self.class_dim = class_dim
        self.shape = output.shape[:-1] if class_dim == -1 else output.shape[:1] + output.shape[2:]
        self.is_embedding = is_embedding
        self.prototypes = prototypes
        self.assignment = assignment
        self.logit_scale = logit_scale
        self.anchors = anchors
        self.anchor_inverse = anchor_inverse

    def read_target(self, target: object, *, ignore_index: int = IGNORE_INDEX) -> Target:
        """The target of each row; raises as `targets.read_target` does.

        Args:
            target: labels (B,) or soft targets (B, C); of positions labels (B, ...) and soft targets as logits are.
            ignore_index: label of samples or positions that do not count.
        """
        num_classes, device = len(self.assignment), self.output.device
        return read_target(target, self.shape, num_classes, device, class_dim=self.class_dim, ignore_index=ignore_index)

    def is_impossible(self) -> Tensor:
        """() bool: whether no head returns this; False for what is not finite, which is an error upstream.

        No cosine is beyond 1, and no embedding longer; means of several outputs are within. Where logits are as wide
        as embeddings, rows that all have length 1 are the latter.
        """
        output = self.output.detach().float()
        if self.is_embedding:
            largest = output.square().sum(dim=1).sqrt().amax()
            return (largest > 1.0 + ROUNDING) & largest.isfinite()
        largest = output.abs().amax() / self.logit_scale
        impossible = (largest > 1.0 + ROUNDING) & largest.isfinite()
        if output.shape[1] != self.prototypes.shape[1]:
            return impossible
        deviation = (output.square().sum(dim=1).sqrt() - 1.0).abs().amax()
        # Orthonormal prototypes at a scale of 1 turn embeddings into logits of length 1.
        return impossible | ((deviation < UNIT_LENGTH) & (self.logit_scale > 1.0 + ROUNDING))

    def check_values(self) -> None:
        """Raise if the output is impossible; on the CPU only, since asking a GPU would wait for it.

        Raises:
            ArgumentError: it is.
        """
        if not can_be_looked_at(self.output) or self.output.device != self.logit_scale.device:
            return
        if bool(self.is_impossible()):
            raise ArgumentError(self.why_impossible())

    def why_impossible(self) -> str:
        """What to say of an output that is."""
        num_classes, dim = len(self.assignment), self.prototypes.shape[1]
        kind = "embeddings" if self.is_embedding else "logits"
        told_by = f" They are as wide as this head's {'logits' if self.is_embedding else 'embeddings'}, too."
        return (
            f"expected {kind} of this head: embeddings have length 1, and logits are cosines, in [-1, 1], times its "
            f"scale. The values given as {kind} (B, {dim if self.is_embedding else num_classes}) are neither."
            f"{told_by if num_classes == dim else ''} Pass what the model returned in this mode, not what another "
            "layer or head did, nor probabilities or features."
        )

    def embeddings(self) -> Tensor:
        """(B, D) float32: themselves, or recovered from logits; see `HypersphericalHead.recover_embeddings`.

        Raises:
            ShapeError: logits of a head that does not keep what recovering takes.
        """
        if self.is_embedding:
            return self.output.float()
        logits = self.output
        if self.anchors is None or self.anchor_inverse is None:
            raise ShapeError(
                'a head with training_output="embedding" expects embeddings of shape '
                f"(B, {self.prototypes.shape[1]}), got logits of shape {tuple(logits.shape)}. Pass what the model "
                "returns in train mode, or head.embed(features)."
            )
        labels = torch.arange(len(self.assignment), device=logits.device)
        label_of = self.assignment.new_zeros(len(self.prototypes)).index_copy(0, self.assignment, labels)  # (P,)
        with full_precision(logits.device):
            cosines = logits.gather(1, label_of[self.anchors].expand(len(logits), -1)).float() / self.logit_scale
            return cosines @ self.anchor_inverse  # (B, A), (A, D) -> (B, D)

    def cosines(self) -> Tensor:
        """(B, C) float32 with all labels' prototypes; O(B C D) from embeddings."""
        if self.is_embedding:
            return assigned_cosines(self.output, self.prototypes, self.assignment)
        return self.output.float() / self.logit_scale

    def own_cosines(self, labels: Tensor) -> Tensor:
        """(B, 1) float32 with the prototype of each sample's own label (B,); O(B D) or, from logits, O(B)."""
        labels = to_look_up(labels, len(self.assignment))
        if self.is_embedding:
            # Not by indexing, which would count a label of -1 from the end.
            own_prototypes = self.prototypes[self.assignment.gather(0, labels)]
            return (self.output.float() * own_prototypes).sum(dim=1, keepdim=True)
        return self.output.gather(1, labels[:, None]).float() / self.logit_scale


def check_has_values(assignment: Tensor, given: Tensor) -> None:
    """Raise where a head's buffers are on the device "meta" and what it is to read is not.

    Raises:
        AssignmentError: they are.
    """
    if assignment.is_meta and not given.is_meta:
        raise AssignmentError(
            "the head has no values now (device meta). Load a checkpoint; of an offloaded model, whose buffers come "
            "back for the time of a call, use what the model returns, or offload without offload_buffers=True."
        )


def choose_anchors(prototypes: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rows of the bank from whose cosines embeddings are recovered, and how.

    $$ z = \text{cosines}_a \; (W_a^\top)^{+} $$

    with min(C, D) assigned prototypes W_a that span what all of them span.

    Args:
        prototypes: (P, D) on the CPU.
        assignment: (C,) int64 on the CPU.

    Returns:
        Anchors (A,) int64, and the pseudo-inverse (A, D) float64.
    """
    # Sorted, so that the choice depends on which prototypes are assigned and not to whom.
    assigned = assignment.sort().values
    rows = prototypes[assigned]  # (C, D)
    chosen = spanning_rows(rows)
    frame = rows[chosen].double()  # (A, D)
    return assigned[chosen], torch.linalg.pinv(frame.T, rtol=SMALLEST_SPANNING)


def spanning_rows(rows: Tensor) -> Tensor:
    r"""Indices of min(N, D) rows that span what all rows span, as far from dependent as a greedy choice gets.

    Each row chosen is the one with the longest part orthogonal to those before it: QR with column pivoting of the
    transpose. Of many rows a random sample of 2 D is looked at first, and all of them only if that does not do.

    Args:
        rows: (N, D) unit rows on the CPU.

    Returns:
        (min(N, D),) int64.

    Examples:
        >>> spanning_rows(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])).tolist()
        [0, 2]

    References:
        Businger, Golub, Linear least squares solutions by Householder transformations, 1965.
    """
    from scipy.linalg import qr

    num_rows, dim = rows.shape
    generator = torch.Generator(device="cpu").manual_seed(0)
    sample = torch.randperm(num_rows, generator=generator, device="cpu")[: 2 * dim].sort().values
    count = min(num_rows, dim)
    while True:
        triangle, order = qr(rows[sample].double().T.numpy(), mode="r", pivoting=True, overwrite_a=True)
        if len(sample) == num_rows or abs(triangle[count - 1, count - 1]) >= SMALLEST_PIVOT:
            return sample[torch.from_numpy(order[:count]).long()]
        sample = torch.arange(num_rows, device="cpu")
