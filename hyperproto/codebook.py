"""Fixed prototypes, and which of them stands for which label: all of a head but its projection."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyperproto.arguments import as_tensor, choice, matrix, positive_number, whole_number
from hyperproto.bank import PrototypeBank, has_values
from hyperproto.checkpoint import check_format, format_version, stamp_format_
from hyperproto.errors import AssignmentError, BankError, ShapeError
from hyperproto.matching.problem import check_assignment
from hyperproto.placement import Placement
from hyperproto.precision import keeping_dtype
from hyperproto.readout import Readout, choose_anchors
from hyperproto.separation import default_logit_scale
from hyperproto.sphere import assigned_cosines, check_unit_rows
from hyperproto.telling import tell

TrainingOutput = Literal["logits", "embedding"]

#: Classes that `Codebook.topk` compares at a time.
TOPK_CHUNK = 16_384


class Codebook(nn.Module):
    r"""C labels on prototypes of a bank, $w_{\sigma(k)}$ for label k, and the temperature of their cosines.

    No prototype ever trains or moves; what changes is `assignment`, an integer buffer, gathered at use, so that
    averaging weights cannot blend two assignments.

    Args:
        bank: at least C prototypes. One that another codebook uses already is copied, so that each moves by itself.
        num_classes: number of labels C, at least 2.
        logit_scale: s > 0; by default `default_logit_scale(bank.prototypes, num_classes)`.
        training_output: what a head returns in train mode, logits or embeddings.

    Attributes:
        assignment: (C,) int64 buffer, the row of the bank that stands for each label.
        logit_scale: () float32 buffer.
        anchors, anchor_inverse: (A,) int64 and (A, D) float32 buffers, A = min(C, D): rows of the bank, and what
            recovers embeddings from the cosines with them. They follow from bank and assignment and are in no
            checkpoint; None where embeddings are returned in training, which has no need of either.
        format_version: () int64 buffer, of the checkpoint's format.
        placement: where in its model it is, or that something took it out.

    Raises:
        ArgumentError: an option outside its range.
        BankError: fewer prototypes than labels.
    """

    __constants__ = ("training_output",)  # what TorchScript may branch on

    #: The dimension of an output that holds classes, or coordinates of embeddings.
    class_dim = -1

    assignment: Tensor
    logit_scale: Tensor
    anchors: Tensor | None
    anchor_inverse: Tensor | None
    training_output: TrainingOutput

    def __init__(
        self,
        bank: PrototypeBank,
        num_classes: int,
        *,
        logit_scale: float | None = None,
        training_output: TrainingOutput = "logits",
    ) -> None:
        super().__init__()
        choice(training_output, "training_output", get_args(TrainingOutput))
        if logit_scale is None:
            logit_scale = default_logit_scale(bank.prototypes, num_classes)
        logit_scale = positive_number(logit_scale, "logit_scale")
        if bank.num_prototypes < num_classes:
            raise BankError(
                f"expected a bank of at least {num_classes} prototypes, got {bank.num_prototypes}. "
                "Build the bank with more prototypes."
            )
        if training_output == "embedding" and bank.dim >= num_classes:
            tell(
                f'training_output="embedding" saves nothing with dim={bank.dim} and {num_classes} labels, and a loss '
                'that is not of this library takes embeddings as wide as that for logits. Use "logits".'
            )
        self.num_classes = num_classes
        self.dim = bank.dim
        self.training_output = training_output
        self.placement = Placement()
        # The tensor, and how often it had been written, whose values `_check_written_assignment` saw last;
        # None for a copy of values that it has not seen.
        self._checked: tuple[int, int] | None = (0, 0)
        self.bank = copy.deepcopy(bank) if bank.in_use else bank
        self.bank.in_use = True
        #: Where `logit_scale` began, which tells whether anything has fitted it since.
        self.initial_logit_scale = logit_scale
        self.register_buffer("assignment", torch.arange(num_classes, device="cpu"))
        self.register_buffer("logit_scale", torch.tensor(logit_scale, dtype=torch.float32, device="cpu"))
        self.register_buffer("format_version", format_version())
        recovers, num_anchors = training_output == "logits", min(num_classes, bank.dim)
        anchors = torch.zeros(num_anchors, device="cpu", dtype=torch.int64) if recovers else None
        inverse = torch.zeros(num_anchors, bank.dim, device="cpu", dtype=torch.float32) if recovers else None
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("anchor_inverse", inverse, persistent=False)
        self._choose_anchors()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def class_prototypes(self) -> Tensor:
        """(C, D): row k is the prototype that stands for label k now."""
        return self.bank.prototypes[self.assignment]

    def assign_(self, assignment: Tensor) -> None:
        """Let label k be represented by prototype `assignment[k]` from now on; in place.

        Args:
            assignment: (C,) int64, no value twice, each in [0, P).

        Raises:
            AssignmentError: anything else; the old assignment stays.
        """
        assignment = as_tensor(assignment, "an assignment", error=AssignmentError)
        check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
        self.assignment.copy_(assignment)
        self._choose_anchors()

    def read(self, output: Tensor) -> Readout:
        """What the model returned, with its kind told by its width: the only place where that is asked.

        Args:
            output: (B, C) logits or (B, D) embeddings, or those of positions, each of which is a sample: (B, ..., C) as
                a head returns them for tokens, (B, C, H, W) as one over feature maps does. For C = D they are
                embeddings where `training_output` says so and the head is in train mode.

        Raises:
            HeadNotFoundError: the head is no longer part of its model.
            ShapeError: neither, by its shape.
            ArgumentError: neither, by its values; on the CPU only.
        """
        self.placement.check(self)
        widths = (self.num_classes, self.dim)
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[self.class_dim] not in widths:
            raise ShapeError(self._why_no_output(output))
        output = as_tensor(output, "the output")
        if not output.is_floating_point():
            raise ShapeError(f"expected an output in a floating dtype, as the model returns it, got {output.dtype}.")
        returned_embeddings = self.training and self.training_output == "embedding"
        is_embedding = returned_embeddings if self.num_classes == self.dim else output.shape[self.class_dim] == self.dim
        readout = self._readout(output, is_embedding)
        readout.check_values()
        return readout

    def is_embedding(self, output: Tensor) -> bool:
        """Whether a model output holds embeddings (B, D) rather than logits (B, C); raises as `read` does."""
        return self.read(output).is_embedding

    def embeddings_from_output(self, output: Tensor) -> Tensor:
        """(N, D) embeddings of N = B samples or positions, recovered where they are logits; raises as `read` does."""
        return self.read(output).embeddings()

    def cosines_from_output(self, output: Tensor) -> Tensor:
        """(N, C) cosines of N = B samples or positions, from logits or embeddings; raises as `read` does."""
        return self.read(output).cosines()

    def target_cosines_from_output(self, output: Tensor, labels: Tensor) -> Tensor:
        """(N, 1) cosines of N = B samples or positions with the prototypes of their labels; raises as `read` does."""
        readout = self.read(output)
        return readout.own_cosines(readout.read_target(labels).values)

    def recover_embeddings(self, logits: Tensor) -> Tensor:
        r"""Embeddings (B, D) whose logits these are, in O(B D^2) whatever C is.

        $$ z = \tfrac{1}{s} \, \text{logits}_a \; (W_a^\top)^{+} $$

        with the rows W_a of min(C, D) assigned prototypes that span what all of them span (`anchors`), and the logits
        of their labels. Exact for the part of z within their span; what is
        orthogonal to all of them leaves no trace in any logit and is lost (nothing is lost where they span the space,
        as for C > D).

        Args:
            logits: (B, C).

        Raises:
            ShapeError: logits of another shape; or the head was made with training_output="embedding", and does not
                keep what this takes.
        """
        num_classes = self.num_classes
        logits = matrix(logits, f"logits of shape (B, {num_classes})", smallest=(0, 1), width=num_classes)
        return self._readout(logits, is_embedding=False).embeddings()

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k labels whose prototypes are nearest, without a (B, C) tensor: classes are taken in chunks.

        Args:
            embeddings: (B, D) unit or zero rows, as `embed` returns.
            k: in [1, C].

        Returns:
            Cosines (B, k), largest first, and labels (B, k) int64.

        Raises:
            ShapeError: embeddings of another shape.
            ArgumentError: k out of range, or rows of another length: features, for example.

        Examples:
            >>> codebook = Codebook(PrototypeBank(4, 3), 4)
            >>> cosines, labels = codebook.topk(codebook.class_prototypes, k=2)
            >>> labels[:, 0].tolist()
            [0, 1, 2, 3]
        """
        embeddings = matrix(embeddings, f"embeddings of shape (B, {self.dim})", smallest=(0, 1), width=self.dim)
        k = whole_number(k, "k", smallest=1, largest=self.num_classes)
        check_unit_rows(embeddings)
        self._check_written_assignment()
        best = embeddings.new_empty((len(embeddings), 0), dtype=torch.float32)
        labels = torch.empty((len(embeddings), 0), dtype=torch.int64, device=embeddings.device)
        for start in range(0, self.num_classes, TOPK_CHUNK):
            chunk = self.assignment[start : start + TOPK_CHUNK]
            cosines = assigned_cosines(embeddings, self.bank.prototypes, chunk)  # (B, chunk)
            values, places = cosines.topk(min(k, len(chunk)), dim=1)
            best, labels = torch.cat([best, values], dim=1), torch.cat([labels, places + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, order)
        return best, labels

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise unless this head can load what a `state_dict` holds for it under a prefix; changes nothing.

        A head without values (on the device "meta", or made by `to_empty`) takes any bank of its shape.

        Raises:
            CheckpointError: written by a later version of this library.
            BankError: other prototypes, in shape or in values.
            AssignmentError: made for another number of labels, or no assignment.
        """
        check_format(state_dict, prefix)
        self.bank.check_checkpoint(state_dict, prefix + "bank.")
        assignment = state_dict.get(prefix + "assignment")
        if assignment is not None and not assignment.is_meta:
            self._check_found(
                assignment,
                f"the checkpoint's {prefix}assignment does not fit this head of {self.num_classes} labels",
                "Convert the model with the checkpoint's num_classes before loading, or drop the keys of the head "
                "to load the others.",
            )

    def _check_written_assignment(self) -> None:
        """Raise if something has written to the buffer `assignment` what is no assignment; for evaluation only.

        Averages over integers do that. The check waits for a GPU, but only after the buffer was written. It is left
        to eager execution: a graph cannot raise by value, and in training buffers may be written at every step
        (DistributedDataParallel broadcasts them).

        Raises:
            AssignmentError: the assignment is not injective.
        """
        if (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return
        assignment = self.assignment
        # Tensors of torch.func.vmap count as never written; other subclasses of Tensor may have no values to look at.
        if type(assignment) is not Tensor or assignment.is_meta or assignment.is_inference():
            return
        written = (id(assignment), assignment._version)
        if (assignment._version == 0 and self._checked is not None) or written == self._checked:
            return
        self._check_found(
            assignment,
            "the buffer `assignment` was written from outside, and is no assignment any more",
            "An average over buffers does that (AveragedModel with use_buffers=True). Average without buffers, or give "
            "this head the model's assignment before each evaluation: averaged_head.assign_(head.assignment).",
        )
        self._checked = written

    def _check_found(self, assignment: Tensor, what: str, advice: str) -> None:
        """Raise, saying what was found and what to do, unless this is an assignment of the codebook's labels."""
        try:
            check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
        except AssignmentError as error:
            raise AssignmentError(f"{what}: {error} {advice}") from error

    def _why_no_output(self, output: object) -> str:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        message = f"expected logits of shape (B, {self.num_classes}) or embeddings of shape (B, {self.dim}), got {got}."
        if isinstance(output, Tensor) and output.dim() > 2:
            here, other, shape = (1, -1, "(B, C, ...)") if self.class_dim == 1 else (-1, 1, "(B, ..., C)")
            message += f" Of positions this head returns {shape}: output.movedim({other}, {here}) where classes moved."
        return message

    def _readout(self, output: Tensor, is_embedding: bool) -> Readout:
        return Readout(
            output,
            self.class_dim,
            is_embedding,
            self.bank.prototypes,
            self.assignment,
            self.logit_scale,
            self.anchors,
            self.anchor_inverse,
        )

    @torch.no_grad()
    def _choose_anchors(self) -> None:
        if self.anchors is None or self.anchor_inverse is None:
            return
        if self.anchors.is_meta or not has_values(self.bank.prototypes):
            return  # a checkpoint brings its own
        anchors, inverse = choose_anchors(self.bank.prototypes.cpu(), self.assignment.cpu())
        self.anchors.copy_(anchors)
        self.anchor_inverse.copy_(inverse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        if recurse:
            for module in self.modules():
                if module is not self:
                    # Batch norm stays float32 as well; one that another package has converted does not know.
                    own = keeping_dtype(fn) if isinstance(module, _BatchNorm) else fn
                    module._apply(own, recurse=False)  # type: ignore[no-untyped-call]
        before = self.assignment
        super()._apply(keeping_dtype(fn), recurse=False)  # type: ignore[no-untyped-call]
        moved = self.assignment is not before and not self.assignment.is_meta
        written = moved and not before.is_inference() and before._version > 0
        # The copy counts as never written: it is to be looked at if what it was made from was not.
        if written and (id(before), before._version) != self._checked:
            self._checked = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_checkpoint(state_dict, prefix)
        stamp_format_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _after_load(codebook: Codebook, incompatible_keys: object) -> None:
    # No checkpoint has them: a head that comes from the device "meta" gets their place here.
    for name in ("anchors", "anchor_inverse"):
        buffer = getattr(codebook, name)
        if buffer is not None and buffer.is_meta:
            setattr(codebook, name, torch.empty_like(buffer, device=codebook.bank.prototypes.device))
    codebook._choose_anchors()
