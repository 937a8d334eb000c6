"""Mistakes of training loops: what an assigner remembers of the batches between two steps, and what a step makes of it.

A training loop pays for a few sums of small tensors on its own device. Whatever waits for them is in the step.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hyperproto.adapted import set_aside_message
from hyperproto.errors import HeadNotFoundError
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads, heads_in_use, require_heads
from hyperproto.module_ref import ModuleRef
from hyperproto.readout import Readout
from hyperproto.targets import SMALLEST_EVIDENCE, Target, is_seen
from hyperproto.telling import tell

#: Batches with gradients after which an optimiser that writes to the rest of the model has stepped.
BATCHES_UNTIL_STEPPED = 4

#: The same where nothing was written at all: gradient scaling may skip the first ones, halving its scale at each.
BATCHES_UNTIL_SCALED = 20

#: Leading entries of each parameter that are compared.
COMPARED_ENTRIES = 4096

#: Fewer samples than that have few labels by chance.
SMALLEST_BATCH = 8

#: What `Oversights.noticed` counts.
BATCHES, OF_ONE_LABEL, OF_TWO_LABELS, IMPOSSIBLE = range(4)
NUM_NOTICED = 4


@dataclass
class _Watched:
    """A parameter as it was."""

    parameter: nn.Parameter
    version: int
    entries: Tensor

    def is_unchanged(self) -> bool:
        # A learning rate of 0 writes and changes nothing; writing through `.data` changes and counts as no writing.
        now = _leading_entries(self.parameter)
        return self.parameter._version == self.version and torch.equal(self.entries.to(now), now)


@dataclass
class Oversights:
    """What one assigner remembers; it tells each cause once.

    Attributes:
        left_out: why a criterion in a training loop did not feed the assigner since the last step, if one did not.
        told: causes that were told.
        watched: parameters of the projection, as they were at the first batch that had gradients.
        versions: how often the model's other parameters had been written to then, in all.
        num_gradients: batches since then whose gradients came back.
        trains: whether an optimiser was seen to write to one.
        is_settled: whether it was seen that the model of a copy was copied too.
    """

    source: ModuleRef
    left_out: str | None = None
    told: set[str] = field(default_factory=set)
    watched: list[_Watched] = field(default_factory=list)
    versions: int = 0
    num_gradients: int = 0
    trains: bool = False
    is_settled: bool = False

    def heads(self, known: tuple[HypersphericalHead, ...]) -> tuple[HypersphericalHead, ...]:
        """The heads of the assigner's model now.

        Args:
            known: the heads that it had; where the model is gone, and they are used by themselves, it has them still.

        Raises:
            HeadNotFoundError: another layer is in the place of the first, or is called instead of it, or this is the
                copy of an assigner that was copied without its model.
        """
        if self.source.is_copy and not self.is_settled:
            gc.collect()  # a model that was copied for this reference alone may be part of a cycle
            self.is_settled = True
        model = self.source.module
        if model is None:
            if self.source.is_copy:
                raise HeadNotFoundError(
                    "this assigner, or its criterion, was copied or pickled without its model: it would move labels of "
                    "a head that no model has. Copy both at once, copy.deepcopy((model, criterion)), or make a new "
                    "assigner and criterion of the copy of the model."
                )
            return known
        found = tuple(heads_in_use(model).values())
        if all(each is not known[0] for each in found):
            if any(each is known[0] for each in get_heads(model).values()):
                raise HeadNotFoundError(set_aside_message(type(model).__name__))
            raise HeadNotFoundError(
                f"the head that this assigner was made for is no longer part of its {type(model).__name__}: another "
                "layer was put in its place, whose outputs are no cosines. If the model has no head any more, call "
                "hyperproto.convert_model(model, ...); then make a new assigner, criterion and optimizer."
            )
        same = len(found) == len(known) and all(one is other for one, other in zip(found, known, strict=True))
        return known if same else require_heads(model)

    def leave_out(self, *, criterion_trains: bool) -> None:
        """Note that a criterion whose loss has gradients does not feed the assigner, for something is in eval mode."""
        if not torch.compiler.is_compiling():
            self.left_out = "the model is in eval mode" if criterion_trains else "the criterion is in eval mode"

    def watch(self, head: HypersphericalHead, readout: Readout) -> None:
        """See whether gradients come back, until it is known that an optimiser writes to the head's projection."""
        if torch.compiler.is_compiling() or self.trains or not readout.output.requires_grad:
            return
        if not self.watched:
            self.watched = [
                _Watched(each, each._version, _leading_entries(each).clone())
                for each in head.projection.parameters()
                if each.requires_grad and _has_entries(each)
            ]
            self.versions = self._versions_of_others()
        if self.watched and self.num_gradients < BATCHES_UNTIL_SCALED:
            readout.output.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]

    def tell(self, head: HypersphericalHead, counts: Tensor, pending: Tensor, lost: Tensor, noticed: Tensor) -> None:
        """Say what was probably not meant; ends the round.

        Args:
            head: the head.
            counts: (C,) samples seen of each label so far.
            pending: (C,) samples of each label since the last step.
            lost: (C,) samples since then that were left out.
            noticed: (NUM_NOTICED,) int64, what `count_batch_` has counted since.
        """
        counts, pending = counts.cpu().double(), pending.cpu().double()
        if not pending.any() and (self.left_out or not counts.any()):
            self._tell_once("nothing fed", _nothing_fed(self.left_out))
        num_seen = int(is_seen(counts).sum())
        if 0 < 10 * num_seen < len(counts) and float(counts.sum()) >= 10 * num_seen:
            self._tell_once(
                "unseen",
                f"after {counts.sum():.0f} samples {len(counts) - num_seen} of {len(counts)} labels were not seen "
                "once. They hold prototypes and count in every softmax. Is num_classes that of the data? See "
                "hyperproto.convert_model(model, num_classes=...). Where labels come later, all is well.",
            )
        num_lost = float(lost.sum())
        if num_lost >= SMALLEST_EVIDENCE:
            num_samples = num_lost + float(pending.sum())
            self._tell_once(
                "lost",
                f"{math.ceil(num_lost)} of {num_samples:.0f} samples since the last step are in no class mean: the "
                "model returned NaN or infinity for them. Look for the cause: broken inputs, the learning rate, half "
                "precision.",
            )
        self._tell_of_optimizer(head)
        num_batches, of_one, of_two, impossible = noticed.tolist()
        if impossible:
            self._tell_once(
                "impossible",
                f"{impossible} batches since the last step were no outputs of this head: embeddings have length 1, "
                "logits are cosines, in [-1, 1], times its scale. Pass the criterion what the model returned, not what "
                "another layer or head did.",
            )
        share = pending / pending.sum().clamp_min(1.0)
        agreement = float(share.square().sum())  # of two samples drawn at random
        few = (2 * of_one > num_batches and agreement < 0.6) or (2 * of_two > num_batches and agreement < 0.25)
        if num_batches >= 3 and few and _centres_batches(head):
            self._tell_once(
                "few labels",
                f"most batches held one or two labels ({of_two} of {num_batches}) where the data have many: the "
                "projection's batch norm takes away what the samples of a batch have in common, which is then their "
                'label. Shuffle the data, mix labels within batches, or convert with projection="linear".',
            )
        self.left_out = None

    def _tell_of_optimizer(self, head: HypersphericalHead) -> None:
        if self.trains or not self.watched:
            return
        # Where parameters are sharded, those of the forward pass are not those that an optimiser has: nothing is known.
        now = {id(each) for each in head.projection.parameters()}
        self.trains = not all(
            id(each.parameter) in now and _has_entries(each.parameter) and each.is_unchanged() for each in self.watched
        )
        steps = self._versions_of_others() != self.versions
        if not self.trains and self.num_gradients >= (BATCHES_UNTIL_STEPPED if steps else BATCHES_UNTIL_SCALED):
            self._tell_once(
                "optimizer",
                f"gradients of {self.num_gradients} batches or more reached the head, and no parameter of its "
                "projection was written: the optimizer does not have them. Make it after hyperproto.convert_model, "
                "from model.parameters(); or, if the projection is meant to stay as it is, set requires_grad to False "
                "in head.projection.",
            )
        if self.trains or "optimizer" in self.told:
            self.trains, self.watched = True, []

    def _versions_of_others(self) -> int:
        model, watched = self.source.module, {id(each.parameter) for each in self.watched}
        return 0 if model is None else sum(each._version for each in model.parameters() if id(each) not in watched)

    def _count_gradient(self, gradient: Tensor) -> None:
        self.num_gradients += 1

    def _tell_once(self, cause: str, message: str) -> None:
        if cause not in self.told:
            self.told.add(cause)
            tell(message)


def count_batch_(noticed: Tensor, readout: Readout, target: Target) -> None:
    """Count, in place and without waiting for a device, what a step will want to know of a batch.

    Args:
        noticed: (NUM_NOTICED,) int64.
        readout: of the batch.
        target: labels, or soft targets, of which nothing is counted.
    """
    # On the CPU such an output was refused already.
    if readout.output.device.type != "cpu":
        noticed[IMPOSSIBLE].add_(readout.is_impossible())
    labels, kept = target.values, target.kept
    if kept is not None and len(labels) >= SMALLEST_BATCH:
        smallest = torch.where(kept, labels, labels.amax()).amin()
        largest = torch.where(kept, labels, smallest).amax()
        of_two = ((labels == smallest) | (labels == largest) | ~kept).all()
        noticed[:IMPOSSIBLE].add_(torch.stack([torch.ones_like(of_two), smallest == largest, of_two]))


def _nothing_fed(left_out: str | None) -> str:
    if left_out is None:
        return (
            "no batch has reached this assigner, and no label can move. Make the criterion from it, "
            "BalancedLoss(assigner) and not BalancedLoss(model), and step the same assigner; with a loss of your own "
            "call assigner.update(output, labels) for each batch."
        )
    return (
        f"no batch has reached this assigner since the last step: gradients were on, but {left_out}, as in validation. "
        "Call model.train() and criterion.train() before each epoch; to keep the backbone's batch norm as it is, "
        "leave the head in train mode: head.train()."
    )


def _centres_batches(head: HypersphericalHead) -> bool:
    """Whether batch norm in the projection sees the batch of one rank alone."""
    norms = [module for module in head.projection.modules() if isinstance(module, _BatchNorm)]
    return any(norm.training and not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def _has_entries(parameter: nn.Parameter) -> bool:
    """Whether values can be read: not where parameters are sharded, and of other classes or empty between passes."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and parameter.untyped_storage().size() > 0


def _leading_entries(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().flatten()[:COMPARED_ENTRIES]
