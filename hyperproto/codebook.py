"""What a head has beside its projection: assigned prototypes, a temperature, and how its outputs are read."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyperproto.arguments import as_tensor, choice, matrix, positive_number, whole_number
from hyperproto.assigned_bank import AssignedBank
from hyperproto.bank import PrototypeBank
from hyperproto.errors import AssignmentError, CheckpointError, ShapeError
from hyperproto.matching.problem import check_assignment
from hyperproto.placement import Placement
from hyperproto.precision import keeping_dtype
from hyperproto.prototypes import has_values
from hyperproto.readout import Readout, check_has_values, choose_anchors
from hyperproto.separation import default_logit_scale
from hyperproto.sphere import assigned_cosines, check_unit_rows
from hyperproto.targets import has_memory, writes_of
from hyperproto.telling import tell

TrainingOutput = Literal["logits", "embedding"]

#: Before the names of an assigner's entries in the `state_dict` of a head that it is attached to.
ASSIGNER = "assigner."

#: Classes that `Codebook.topk` compares at a time.
TOPK_CHUNK = 16_384


class Codebook(AssignedBank):
    r"""C labels on prototypes of a bank, and the temperature of their cosines: what outputs are read by.

    Args:
        bank: at least C prototypes. One that another head uses already is copied, so that each moves by itself.
        num_classes: number of labels C, at least 2.
        logit_scale: s > 0; by default `default_logit_scale(bank.prototypes, num_classes)`.
        training_output: what a head returns in train mode, logits or embeddings.

    Attributes:
        logit_scale: () float32 buffer.
        anchors, anchor_inverse: (A,) int64 and (A, D) float32 buffers, A = min(C, D): rows of the bank, and what
            recovers embeddings from the cosines with them. They follow from bank and assignment and are in no
            checkpoint; None where embeddings are returned in training, which has no need of either.
        placement: where in its model it is, or that something took it out.

    Raises:
        ArgumentError: an option outside its range.
        BankError: fewer prototypes than labels.
    """

    __constants__ = ("training_output",)  # what TorchScript may branch on

    #: The dimension of an output that holds classes, or coordinates of embeddings.
    class_dim = -1

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
        choice(training_output, "training_output", get_args(TrainingOutput))
        super().__init__(bank, num_classes)
        #: Whether the scale follows from the bank, which may have no values yet.
        self._scale_of_bank = logit_scale is None
        if logit_scale is None:
            logit_scale = default_logit_scale(bank.prototypes, num_classes)
        logit_scale = positive_number(logit_scale, "logit_scale")
        if training_output == "embedding" and bank.dim >= num_classes:
            tell(
                f'training_output="embedding" saves nothing with dim={bank.dim} and {num_classes} labels, and a loss '
                'that is not of this library takes embeddings as wide as that for logits. Use "logits".'
            )
        self.training_output = training_output
        self.placement = Placement()
        self._attached: tuple[Any, ...] = ()  # in a tuple, so that it becomes no submodule
        #: Where `logit_scale` began, which tells whether anything has fitted it since.
        self.initial_logit_scale = logit_scale
        self.register_buffer("logit_scale", torch.tensor(logit_scale, dtype=torch.float32, device="cpu"))
        recovers, num_anchors = training_output == "logits", min(num_classes, bank.dim)
        anchors = torch.zeros(num_anchors, device="cpu", dtype=torch.int64) if recovers else None
        inverse = torch.zeros(num_anchors, bank.dim, device="cpu", dtype=torch.float32) if recovers else None
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("anchor_inverse", inverse, persistent=False)
        #: Bank, assignment and both of these, and how often each had been written, when anchors were last right.
        self._anchored: tuple[tuple[int, int], ...] = ()
        #: Whether anchors could not be chosen so far, since the bank had no values.
        self._anchors_wanting = False
        self._choose_anchors()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

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
        check_has_values(self.assignment, embeddings)
        self._look()
        best = embeddings.new_empty((len(embeddings), 0), dtype=torch.float32)
        labels = torch.empty((len(embeddings), 0), dtype=torch.int64, device=embeddings.device)
        for start in range(0, self.num_classes, TOPK_CHUNK):
            chunk = self.assignment[start : start + TOPK_CHUNK]
            cosines = assigned_cosines(embeddings, self.bank(), chunk)  # (B, chunk)
            values, places = cosines.topk(min(k, len(chunk)), dim=1)
            best, labels = torch.cat([best, values], dim=1), torch.cat([labels, places + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, order)
        return best, labels

    def attach(self, assigner: nn.Module) -> None:
        """Let the checkpoint of this head bring back the state of an assigner, where it holds one."""
        self._attached = (assigner,)

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """As of the base class, and the scale.

        Raises:
            CheckpointError: a scale that is not positive and finite.
        """
        super().check_checkpoint(state_dict, prefix)
        for assigner in self._attached:
            assigner.check_checkpoint(state_dict, prefix + ASSIGNER)
        scale = state_dict.get(prefix + "logit_scale")
        if scale is not None and not scale.is_meta and not 0.0 < float(scale) < math.inf:
            raise CheckpointError(
                f"expected the checkpoint's {prefix}logit_scale to be positive and finite, got {float(scale)}. Set it "
                "to a scale that a head can be made with, or drop the key and load with strict=False."
            )

    def train(self, mode: bool = True) -> "Codebook":
        """As of any module; anchors are seen to here too, for what is compiled from then on."""
        with suppress(AssignmentError):  # which the next evaluation raises
            self._follow_bank()
        super().train(mode)
        return self

    def _why_no_output(self, output: object) -> str:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        message = f"expected logits of shape (B, {self.num_classes}) or embeddings of shape (B, {self.dim}), got {got}."
        if isinstance(output, Tensor) and output.dim() > 2:
            here, other, shape = (1, -1, "(B, C, ...)") if self.class_dim == 1 else (-1, 1, "(B, ..., C)")
            message += f" Of positions this head returns {shape}: output.movedim({other}, {here}) where classes moved."
        return message

    def _readout(self, output: Tensor, is_embedding: bool) -> Readout:
        check_has_values(self.assignment, output)
        if not is_embedding:
            self._follow_bank()
        return Readout(
            output,
            self.class_dim,
            is_embedding,
            self.bank(),
            self.assignment,
            self.logit_scale,
            self.anchors,
            self.anchor_inverse,
        )

    def _write(self, assignment: Tensor, count: int) -> None:
        super()._write(assignment, count)
        self._choose_anchors()

    def _follow_bank(self) -> None:
        """Choose anchors anew where bank or assignment were written or replaced, and the anchors were not with them.

        Copies of a `state_dict` entry by entry do that. What copies or broadcasts all buffers has brought the anchors
        that belong to the rest. Waits for no device where nothing was written.

        Raises:
            AssignmentError: what was written is no assignment.
        """
        if self.anchors is None or self.anchor_inverse is None or torch.compiler.is_compiling():
            return
        buffers = (self.bank.prototypes, self._entries()[0], self.anchors, self.anchor_inverse)
        if any(each.is_meta or each.is_inference() or not has_memory(each) for each in buffers):
            return
        if self._anchors_wanting and has_values(self.bank.prototypes):
            self._choose_anchors()
            return
        now = writes_of(buffers)
        if self._anchored and now[:2] != self._anchored[:2] and now[2:] == self._anchored[2:]:
            check_assignment(self._entries()[0].cpu(), self.num_classes, self.bank.num_prototypes)
            self._choose_anchors()
        else:
            self._anchored = now

    @torch.no_grad()
    def _choose_anchors(self) -> None:
        if self.anchors is None or self.anchor_inverse is None:
            return
        self._anchors_wanting = self.anchors.is_meta or not has_values(self.bank.prototypes)
        if self._anchors_wanting:
            return
        anchors, inverse = choose_anchors(self.bank.prototypes.cpu(), self._entries()[0].cpu())
        self.anchors.copy_(anchors)
        self.anchor_inverse.copy_(inverse)
        self._anchored = ()
        self._follow_bank()

    def __getstate__(self) -> dict[str, Any]:
        # Of these tensors, not of a copy's; and a copy has no assigner.
        return {**super().__getstate__(), "_anchored": (), "_attached": ()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        self._give_anchors_a_place()
        if recurse:
            for module in self.modules():
                if module is not self:
                    # Batch norm stays float32 as well; one that another package has converted does not know.
                    own = keeping_dtype(fn) if isinstance(module, _BatchNorm) else fn
                    module._apply(own, recurse=False)  # type: ignore[no-untyped-call]
        super()._apply(keeping_dtype(fn), recurse=False)  # type: ignore[no-untyped-call]
        self._awaits_values = self._awaits_values or self._entries()[0].is_meta
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix + "logit_scale"
        if name in state_dict:  # assign=True takes the dtype that comes
            state_dict[name] = state_dict[name].to(self.logit_scale.dtype)
        of_assigner = [name for name in state_dict if name.startswith(prefix + ASSIGNER)]
        entries = {name.removeprefix(prefix + ASSIGNER): state_dict.pop(name) for name in of_assigner}
        for assigner in self._attached if entries else ():
            assigner.load_state_dict(entries)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _give_anchors_a_place(self) -> None:
        """Let anchors leave the device "meta" once the bank has: no checkpoint brings them."""
        place = self.bank.prototypes.device
        if place.type == "meta" or self._entries()[0].is_meta:
            return
        for name in ("anchors", "anchor_inverse"):
            buffer = getattr(self, name)
            if buffer is not None and buffer.is_meta:
                setattr(self, name, torch.empty_like(buffer, device=place))
                self._anchored = ()
        if not self._anchored:
            self._choose_anchors()


def _after_load(codebook: Codebook, incompatible_keys: object) -> None:
    codebook._awaits_values = codebook._entries()[0].is_meta
    codebook._give_anchors_a_place()
    codebook._choose_anchors()
