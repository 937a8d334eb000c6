"""The classifier that does not train: a projection onto the sphere, and cosines with fixed prototypes."""

from typing import Any, get_args

import torch
from torch import Tensor

from hyperproto.arguments import choice, seed_number, shown, whole_number
from hyperproto.bank import PrototypeBank
from hyperproto.codebook import TrainingOutput
from hyperproto.errors import ArgumentError, BankError, NotLinearError
from hyperproto.precision import check_full_precision
from hyperproto.projection import (
    Projection,
    be_leaf_,
    build_projection,
    check_features,
    seed_of_projection,
    unflatten_rows,
)
from hyperproto.restart import Restartable
from hyperproto.sphere import assigned_cosines, normalise

# Leaves to torch.fx where a head itself is traced: what they decide by shape is decided when the graph runs, and the
# buffers that they gather from enter it by name, where gathering them while tracing would freeze the assignment of that
# moment into a constant.
torch.fx.wrap("assigned_cosines")
torch.fx.wrap("check_features")
torch.fx.wrap("normalise")
torch.fx.wrap("unflatten_rows")


#: What a head was built for and cannot become by an assignment.
FIXED = ("num_classes", "dim", "in_features", "out_features")


class HypersphericalHead(Restartable):
    r"""Classifier over fixed unit prototypes: logits are scaled cosines.

    $$ z = \frac{A x}{\lVert A x \rVert}, \qquad \text{logits}_k = s \, \langle z, w_{\sigma(k)} \rangle $$

    Column k belongs to label k, whatever the assignment. No prototype ever trains or moves; what changes is
    `assignment` (an integer buffer, gathered at use, so that averaging weights cannot blend two assignments).
    Everything from the normalisation on is computed in float32, also under autocast and in half-precision models.

    The assignment comes through averages of weights and checkpoints as it is, or evaluation raises: see
    `hyperproto.assignment_record`.

    Args:
        in_features: width of the features that come in.
        num_classes: number of labels C, at least 2.
        dim: dimension D of the embeddings, at least 2; by default the bank's, or `in_features`.
        bank: a method of `PrototypeBank`, or a bank with at least C prototypes of dimension D.
        projection: "none" uses the features themselves (needs dim == in_features); "linear" a bias-free linear map,
            so that scaling the features changes no logit; "linear+bn" the same with batch norm before the
            normalisation; "auto" is "linear+bn".
        logit_scale: s > 0; by default such that a sample on its prototype gets a probability of 0.99 from a simplex,
            and smaller in few dimensions (`separation.default_logit_scale`).
        training_output: "logits", or "embedding": in train mode return z (B, D), so that this library's losses cost
            O(B D) whatever C is. In eval mode logits are returned in either case.
        seed: of the bank, and of the projection's start, which are independent of each other.

    Attributes:
        out_features: C, by the name that nn.Linear has for it.
        class_names: C names in the order of the labels, or None.

    Shape:
        features (..., in_features) -> logits (..., C), float32.

    Raises:
        ArgumentError: an option outside its range.
        BankError: the bank cannot be built or does not fit.
        ShapeError: at call, for features of another width.
        AssignmentError: at call, in eval mode or under `no_grad`, where the buffers are an average over different
            assignments, or `assignment` was overwritten by none.

    Examples:
        >>> head = HypersphericalHead(64, 10, dim=5)
        >>> head(torch.randn(2, 64)).shape, head.embed(torch.randn(2, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 5]))

    References:
        Saadabadi et al., CVPR 2024, section 3; Yang et al., NeurIPS 2022 (fixed ETF classifier).
    """

    # Of the base class: TorchScript reads the annotations of the class that it is given, and no others.
    assignment: Tensor
    logit_scale: Tensor
    anchors: Tensor | None
    anchor_inverse: Tensor | None
    training_output: TrainingOutput

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
        in_features = whole_number(in_features, "in_features", smallest=1)
        num_classes = whole_number(num_classes, "num_classes", smallest=2)
        seed = seed_number(seed)
        choice(projection, "projection", get_args(Projection))
        if not isinstance(bank, str | PrototypeBank):
            raise BankError(
                f"expected bank to be a method's name or a PrototypeBank, got {shown(bank)}. Rows of your own make one "
                "by PrototypeBank.from_tensor(rows)."
            )
        if dim is None:
            dim = bank.dim if isinstance(bank, PrototypeBank) else in_features
        dim = whole_number(dim, "dim")
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
        super().__init__(bank, num_classes, logit_scale=logit_scale, training_output=training_output)
        self.in_features = in_features
        self.out_features = num_classes
        self.class_names: tuple[str, ...] | None = None
        self.projection = build_projection(projection, in_features, dim, seed=seed_of_projection(seed))
        be_leaf_(self)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., C) logits, or (..., D) embeddings in train mode if so chosen."""
        return self._output(self.embed(features))

    def embed(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., D) unit rows in float32; a zero row stays zero."""
        if not torch.jit.is_scripting():
            check_full_precision(self.logit_scale)
            check_features(features, self.in_features)
        # In rows: what torch.nn.SyncBatchNorm.convert_sync_batchnorm puts in takes the second dimension for channels.
        rows = self.projection(features.flatten(0, -2))
        return normalise(unflatten_rows(rows, features))

    def _output(self, embeddings: Tensor) -> Tensor:
        """What the head returns for embeddings (..., D): logits (..., C), or themselves in train mode if so chosen."""
        if self.training and self.training_output == "embedding":
            return embeddings
        if not torch.jit.is_scripting():
            self._look()
        return assigned_cosines(embeddings, self.bank(), self.assignment) * self.logit_scale

    def like(self, bank: PrototypeBank, *, logit_scale: float | None) -> "HypersphericalHead":
        """A fresh head of the same kind and options on another bank, with projection "linear+bn"."""
        head = type(self)(
            self.in_features,
            self.num_classes,
            bank=bank,
            projection="linear+bn",
            logit_scale=logit_scale,
            training_output=self.training_output,
        )
        head.class_names = self.class_names
        return head

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, dim={self.dim}, "
            f"training_output={self.training_output!r}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and self.__dict__.get(name, value) != value:
            raise ArgumentError(
                f"a head's {name} is fixed: expected {self.__dict__[name]}, got {value!r}. Build another head, or "
                "restore the model and convert it anew: hyperproto.convert_model(hyperproto.restore_model(model), ...)."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise NotLinearError(
                f"a HypersphericalHead has no {name}: its logits are cosines, not a linear map. Whatever needs one, "
                "such as timm's TestTimePoolHead, fuse() or --head-init-scale, works on hyperproto.to_linear(model)."
            )
        return super().__getattr__(name)
