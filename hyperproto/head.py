"""The classifier that does not train: fixed prototypes, and which of them stands for which label."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyperproto.bank import PrototypeBank, has_values
from hyperproto.checkpoint import check_format, check_same_prototypes, format_version, stamp_format_
from hyperproto.errors import (
    ArgumentError,
    AssignmentError,
    BankError,
    HeadNotFoundError,
    NotLinearError,
    ShapeError,
)
from hyperproto.geometry import SMALLEST_SPANNING, normalise, spanning_rows
from hyperproto.logits import default_logit_scale, scaled_cosines
from hyperproto.matching.check import check_assignment
from hyperproto.precision import full_precision, keeping_dtype
from hyperproto.projection import Projection, build_projection, check_features, unflatten_rows

TrainingOutput = Literal["logits", "embedding"]

# Leaves to torch.fx: what they decide by shape is decided when a traced graph runs, and the buffers that they gather
# from enter it by name, where gathering them while tracing would freeze the assignment of that moment into a constant.
torch.fx.wrap("check_features")
torch.fx.wrap("normalise")
torch.fx.wrap("scaled_cosines")
torch.fx.wrap("unflatten_rows")

#: Classes that `HypersphericalHead.topk` compares at a time.
TOPK_CHUNK = 16_384


class HypersphericalHead(nn.Module):
    r"""Classifier over fixed unit prototypes: logits are scaled cosines.

    $$ z = \frac{A x}{\lVert A x \rVert}, \qquad \text{logits}_k = s \, \langle z, w_{\sigma(k)} \rangle $$

    Column k belongs to label k, whatever the assignment. No prototype ever trains or moves; what changes is
    `assignment` (an integer buffer, gathered at use, so that averaging weights cannot blend two assignments).
    Everything from the normalisation on is computed in float32, also under autocast and in half-precision models.

    timm's `ModelEmaV3` and torch's `AveragedModel` copy integers, so that an average carries the latest assignment.
    With `use_buffers=True` torch averages integers too, and the averaged head raises at evaluation until it is given
    the model's assignment again, `averaged_head.assign_(head.assignment)`.

    Args:
        in_features: width of the features that come in.
        num_classes: number of labels C, at least 2.
        dim: dimension D of the embeddings, at least 2; by default the bank's, or `in_features`.
        bank: a method of `PrototypeBank`, or a bank with at least C prototypes of dimension D.
        projection: "none" uses the features themselves (needs dim == in_features); "linear" a bias-free linear map,
            so that scaling the features changes no logit; "linear+bn" the same with batch norm before the
            normalisation; "auto" is "linear+bn".
        logit_scale: s > 0; by default `default_logit_scale(bank, num_classes)`.
        training_output: "logits", or "embedding": in train mode return z (B, D), so that this library's losses cost
            O(B D) whatever C is. In eval mode logits are returned in either case.
        seed: of the bank and of the projection's start.

    Shape:
        features (..., in_features) -> logits (..., C), float32.

    Raises:
        ArgumentError: an option outside its range.
        BankError: the bank cannot be built or does not fit.
        ShapeError: at call, for features of another width.
        AssignmentError: at call, in eval mode or under `no_grad`, where `assignment` was overwritten by no assignment.

    Examples:
        >>> head = HypersphericalHead(64, 10, dim=5)
        >>> head(torch.randn(2, 64)).shape, head.embed(torch.randn(2, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 5]))

    References:
        Saadabadi et al., CVPR 2024, section 3; Yang et al., NeurIPS 2022 (fixed ETF classifier).
    """

    assignment: Tensor
    logit_scale: Tensor
    anchors: Tensor | None
    anchor_inverse: Tensor | None
    training_output: Final[TrainingOutput]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        bank: str | PrototypeBank = "auto",
        projection: Projection = "auto",
        logit_scale: float | None = None,
        training_output: TrainingOutput = "logits",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_options(in_features, num_classes, projection, logit_scale, training_output)
        if dim is None:
            dim = bank.dim if isinstance(bank, PrototypeBank) else in_features
        if projection == "none" and dim != in_features:
            raise ArgumentError(
                f'projection="none" needs dim == in_features, got dim={dim} and in_features={in_features}. '
                'Use projection="linear" or "linear+bn".'
            )
        if isinstance(bank, str):
            bank = PrototypeBank(num_classes, dim, method=bank, seed=seed)
        if bank.dim != dim or bank.num_prototypes < num_classes:
            raise BankError(
                f"expected a bank of at least {num_classes} prototypes in dimension {dim}, "
                f"got {bank.num_prototypes} in dimension {bank.dim}."
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.dim = dim
        self.training_output = training_output
        # Set by what takes the head out of its model.
        self.retired = False
        # The tensor, and how often it had been written, whose values `_check_written_assignment` saw last;
        # None for a copy of values that it has not seen.
        self._checked: tuple[int, int] | None = (0, 0)
        self.projection = build_projection(projection, in_features, dim, seed=seed)
        self.bank = bank
        scale = default_logit_scale(bank, num_classes) if logit_scale is None else float(logit_scale)
        self.register_buffer("assignment", torch.arange(num_classes, device="cpu"))
        self.register_buffer("logit_scale", torch.tensor(scale, dtype=torch.float32, device="cpu"))
        self.register_buffer("format_version", format_version())
        # Rows of the bank, and what recovers embeddings from the cosines with them. A head that returns embeddings in
        # training has no need of either.
        recovers, num_anchors = training_output == "logits", min(num_classes, dim)
        anchors = torch.zeros(num_anchors, device="cpu", dtype=torch.int64) if recovers else None
        inverse = torch.zeros(num_anchors, dim, device="cpu", dtype=torch.float32) if recovers else None
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("anchor_inverse", inverse, persistent=False)
        self._choose_anchors()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def class_prototypes(self) -> Tensor:
        """(C, D): row k is the prototype that stands for label k now."""
        return self.bank.prototypes[self.assignment]

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., C) logits, or (..., D) embeddings in train mode if so chosen."""
        embeddings = self.embed(features)
        if self.training and self.training_output == "embedding":
            return embeddings
        if not torch.jit.is_scripting():
            self._check_written_assignment()
        return scaled_cosines(embeddings, self.bank.prototypes, self.assignment, self.logit_scale)

    def embed(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., D) unit rows in float32; a zero row stays zero."""
        if not torch.jit.is_scripting():
            check_features(features, self.in_features)
        # In rows: what torch.nn.SyncBatchNorm.convert_sync_batchnorm puts in takes the second dimension for channels.
        rows = self.projection(features.flatten(0, -2))
        return normalise(unflatten_rows(rows, features))

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k labels whose prototypes are nearest, without a (B, C) tensor: classes are taken in chunks.

        Args:
            embeddings: (B, D), as `embed` returns.
            k: in [1, C].

        Returns:
            Cosines (B, k), largest first, and labels (B, k) int64.

        Raises:
            ShapeError: embeddings of another shape.
            ArgumentError: k out of range.

        Examples:
            >>> head = HypersphericalHead(3, 4, projection="none")
            >>> cosines, labels = head.topk(head.class_prototypes, k=2)
            >>> labels[:, 0].tolist()
            [0, 1, 2, 3]
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.dim:
            raise ShapeError(f"expected embeddings of shape (B, {self.dim}), got {tuple(embeddings.shape)}.")
        if not 1 <= k <= self.num_classes:
            raise ArgumentError(f"k must lie in [1, {self.num_classes}], got {k}.")
        self._check_written_assignment()
        best = embeddings.new_empty((len(embeddings), 0), dtype=torch.float32)
        labels = torch.empty((len(embeddings), 0), dtype=torch.int64, device=embeddings.device)
        one = torch.ones_like(self.logit_scale)
        for start in range(0, self.num_classes, TOPK_CHUNK):
            chunk = self.assignment[start : start + TOPK_CHUNK]
            cosines = scaled_cosines(embeddings, self.bank.prototypes, chunk, one)  # (B, chunk)
            values, places = cosines.topk(min(k, len(chunk)), dim=1)
            best, labels = torch.cat([best, values], dim=1), torch.cat([labels, places + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, order)
        return best, labels

    def assign_(self, assignment: Tensor) -> None:
        """Let label k be represented by prototype `assignment[k]` from now on; in place.

        Args:
            assignment: (C,) int64, no value twice, each in [0, P).

        Raises:
            AssignmentError: anything else; the old assignment stays.
        """
        check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
        self.assignment.copy_(assignment)
        self._choose_anchors()

    def recover_embeddings(self, logits: Tensor) -> Tensor:
        r"""Embeddings (B, D) whose logits these are, in O(B D^2) whatever C is.

        $$ z = \tfrac{1}{s} \, \text{logits}_a \; (W_a^\top)^{+} $$

        with the rows W_a of min(C, D) assigned prototypes that span what all of them span (see
        `geometry.spanning_rows`), and the logits of their labels. Exact for the part of z within their span; what is
        orthogonal to all of them leaves no trace in any logit and is lost (nothing is lost where they span the space,
        as for C > D).

        Args:
            logits: (B, C).

        Raises:
            ShapeError: the head was made with training_output="embedding", and does not keep what this takes.
        """
        if self.anchors is None or self.anchor_inverse is None:
            raise ShapeError(
                f'a head with training_output="embedding" expects embeddings of shape (B, {self.dim}), got logits of '
                f"shape {tuple(logits.shape)}. Pass what the model returns in train mode, or head.embed(features)."
            )
        labels = torch.arange(self.num_classes, device=logits.device)
        label_of = self.assignment.new_zeros(self.bank.num_prototypes).index_copy(0, self.assignment, labels)  # (P,)
        with full_precision(logits.device):
            cosines = logits.gather(1, label_of[self.anchors].expand(len(logits), -1)).float() / self.logit_scale
            return cosines @ self.anchor_inverse  # (B, A), (A, D) -> (B, D)

    def embeddings_from_output(self, output: Tensor) -> Tensor:
        """(B, D) embeddings from what the model returned: themselves, or recovered from logits.

        Raises:
            ShapeError: neither (B, C) nor (B, D).
        """
        return output.float() if self.is_embedding(output) else self.recover_embeddings(output)

    def cosines_from_output(self, output: Tensor) -> Tensor:
        """(B, C) cosines from what the model returned, logits or embeddings.

        Raises:
            ShapeError: neither (B, C) nor (B, D).
        """
        if self.is_embedding(output):
            return scaled_cosines(output, self.bank.prototypes, self.assignment, torch.ones_like(self.logit_scale))
        return output.float() / self.logit_scale

    def target_cosines_from_output(self, output: Tensor, labels: Tensor) -> Tensor:
        """(B, 1) cosine of each sample with its own label's prototype; O(B D) from embeddings, O(B) from logits.

        Args:
            output: (B, C) logits or (B, D) embeddings.
            labels: (B,) int64.
        """
        if self.is_embedding(output):
            # Not by indexing, which would count a label of -1 from the end.
            own_prototypes = self.bank.prototypes[self.assignment.gather(0, labels)]
            return (output.float() * own_prototypes).sum(dim=1, keepdim=True)
        return output.gather(1, labels[:, None]).float() / self.logit_scale

    def is_embedding(self, output: Tensor) -> bool:
        """Whether a model output (B, ...) holds embeddings (B, D) rather than logits (B, C); told by its width.

        Raises:
            HeadNotFoundError: the head is no longer part of its model.
            ShapeError: neither.
        """
        self.check_in_use()
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] not in (self.num_classes, self.dim):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(
                f"expected logits of shape (B, {self.num_classes}) or embeddings of shape (B, {self.dim}), got {got}."
            )
        if self.num_classes == self.dim:
            return self.training and self.training_output == "embedding"
        return output.shape[1] == self.dim

    def check_in_use(self) -> None:
        """Raise if the head was taken out of its model: what is bound to it would learn nothing from then on.

        Raises:
            HeadNotFoundError: it was.
        """
        if self.retired:
            raise HeadNotFoundError(
                "this HypersphericalHead is no longer part of its model: restore_model, to_linear, compress_head or "
                "the model's reset_classifier took it out. If the model has no other one, call "
                "hyperproto.convert_model(model, ...) again; then make a new assigner, criterion and optimizer."
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
        try:
            check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
        except AssignmentError as error:
            raise AssignmentError(
                f"the buffer `assignment` was written from outside, and is no assignment any more: {error} An average "
                "over buffers does that (AveragedModel with use_buffers=True). Average without buffers, or give this "
                "head the model's assignment before each evaluation: averaged_head.assign_(head.assignment)."
            ) from error
        self._checked = written

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise unless this head can load what a `state_dict` holds for it under a prefix; changes nothing.

        A head without values (on the device "meta", or made by `to_empty`) takes any bank of its shape.

        Raises:
            CheckpointError: written by a later version of this library.
            BankError: other prototypes, in shape or in values.
            AssignmentError: made for another number of labels, or no assignment.
        """
        check_format(state_dict, prefix)
        prototypes = state_dict.get(prefix + "bank.prototypes")
        if prototypes is not None:
            check_same_prototypes(self.bank.prototypes, prototypes, prefix + "bank.prototypes")
        assignment = state_dict.get(prefix + "assignment")
        if assignment is not None and not assignment.is_meta:
            try:
                check_assignment(assignment, self.num_classes, self.bank.num_prototypes)
            except AssignmentError as error:
                raise AssignmentError(
                    f"the checkpoint's {prefix}assignment does not fit this head of {self.num_classes} labels: {error} "
                    "Convert the model with the checkpoint's num_classes before loading, or drop the keys of the head "
                    "to load the others."
                ) from error

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, dim={self.dim}, "
            f"training_output={self.training_output!r}"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise NotLinearError(
                f"a HypersphericalHead has no {name}: its logits are cosines, not a linear map. Whatever needs one, "
                "such as timm's TestTimePoolHead, fuse() or --head-init-scale, works on hyperproto.to_linear(model)."
            )
        return super().__getattr__(name)

    @torch.no_grad()
    def _choose_anchors(self) -> None:
        if self.anchors is None or self.anchor_inverse is None:
            return
        if self.anchors.is_meta or not has_values(self.bank.prototypes):
            return  # a checkpoint brings its own
        # Sorted, so that the choice depends on which prototypes are assigned and not to whom.
        assigned = self.assignment.cpu().sort().values
        rows = self.bank.prototypes.cpu()[assigned]  # (C, D)
        chosen = spanning_rows(rows)
        frame = rows[chosen].double()  # (A, D)
        self.anchors.copy_(assigned[chosen])
        self.anchor_inverse.copy_(torch.linalg.pinv(frame.T, rtol=SMALLEST_SPANNING))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HypersphericalHead":
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


def get_heads(model: nn.Module) -> dict[str, HypersphericalHead]:
    """Hyperspherical heads of a model by dotted name ("" if the model is a head itself); empty if it has none.

    Sees through wrappers such as DistributedDataParallel and torch.compile.

    Examples:
        >>> list(get_heads(nn.Sequential(nn.Flatten(), HypersphericalHead(8, 4))))
        ['1']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, HypersphericalHead)}


def require_heads(model: nn.Module) -> tuple[HypersphericalHead, ...]:
    """The model's heads, at least one.

    Raises:
        HeadNotFoundError: there is none.
    """
    heads = tuple(get_heads(model).values())
    if not heads:
        raise HeadNotFoundError(
            f"{type(model).__name__} has no HypersphericalHead. Call hyperproto.convert_model(model, ...) first."
        )
    return heads


def _check_options(
    in_features: int,
    num_classes: int,
    projection: Projection,
    logit_scale: float | None,
    training_output: TrainingOutput,
) -> None:
    if in_features < 1 or num_classes < 2:
        raise ArgumentError(
            f"expected in_features >= 1 and num_classes >= 2, got in_features={in_features} and "
            f"num_classes={num_classes}."
        )
    for name, value, choices in (
        ("projection", projection, get_args(Projection)),
        ("training_output", training_output, get_args(TrainingOutput)),
    ):
        if value not in choices:
            raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if logit_scale is not None and not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ArgumentError(f"logit_scale must be finite and positive, got {logit_scale}.")


def _after_load(head: HypersphericalHead, incompatible_keys: object) -> None:
    # No checkpoint has them: a head that comes from the device "meta" gets their place here.
    for name in ("anchors", "anchor_inverse"):
        buffer = getattr(head, name)
        if buffer is not None and buffer.is_meta:
            setattr(head, name, torch.empty_like(buffer, device=head.bank.prototypes.device))
    head._choose_anchors()
