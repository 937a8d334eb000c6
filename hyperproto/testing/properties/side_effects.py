"""What a loss is given, and what is global, stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from hyperproto.assigner import DynamicAssigner
from hyperproto.testing.requirements import require
from hyperproto.testing.state import changed, global_state, state_of
from hyperproto.testing.subject import Subject


def leaves_its_arguments_alone(subject: Subject) -> None:
    """Neither the output nor the labels nor the soft targets change."""
    batch = subject.balanced()
    soft = subject.mixed(batch.labels)
    for target, name in ((batch.labels, "labels"), (soft, "soft targets")):
        output = subject.output(batch.embeddings.clone().requires_grad_())
        before = output.detach().clone(), target.clone()
        subject.call(output, target)
        require(torch.equal(output.detach(), before[0]), f"the loss changed the output under {name}")
        require(torch.equal(target, before[1]), f"the loss changed the {name}")


def leaves_what_is_global_alone(subject: Subject) -> None:
    """Nothing is drawn from a global generator or seeded anew, and no default changes."""
    batch = subject.balanced()
    before = global_state()
    for target in (batch.labels, subject.one_hot(batch.labels)):
        subject.value(batch.embeddings.clone().requires_grad_(), target)
    _require_unchanged(before, global_state(), "in training")


def leaves_the_head_alone(subject: Subject) -> None:
    """A training batch changes nothing of the head, and no module's mode."""
    batch = subject.balanced()
    modules = _modules(subject)
    before, modes = state_of(subject.watched), _modes(modules)
    subject.value(batch.embeddings.clone().requires_grad_(), batch.labels)
    _require_unchanged(before, state_of(subject.watched), "in training")
    require(_modes(modules) == modes, "the loss changed the train or eval mode of itself or the head")


def evaluating_changes_nothing(subject: Subject) -> None:
    """In eval mode, and in train mode under `no_grad`, loss, head and assigner stay as they are."""
    for trial, gradients, where in ((subject.evaluating(), True, "in eval mode"), (subject, False, "under no_grad")):
        batch, modules = trial.balanced(), _modules(trial)
        for target in (batch.labels, trial.mixed(batch.labels)):
            before = state_of(modules)
            with torch.set_grad_enabled(gradients):
                first = trial.result(batch.embeddings, target)
                _require_unchanged(before, state_of(modules), where)
                second = trial.result(batch.embeddings, target)
            require(torch.equal(first, second), f"the loss of one batch is another one at the second call, {where}")


def feeds_its_assigner_once(subject: Subject) -> None:
    """In training an assigner counts each sample once."""
    assigner = getattr(subject.loss, "assigner", None)
    if not isinstance(assigner, DynamicAssigner) or not subject.training:
        return
    batch = subject.imbalanced()
    before = assigner.class_counts.clone()
    subject.value(batch.embeddings.clone().requires_grad_(), batch.labels)
    fed = (assigner.class_counts - before).cpu()
    expected = torch.bincount(batch.labels.cpu(), minlength=len(fed)).float()
    require(torch.equal(fed, expected), f"the assigner was fed {float(fed.sum()):g} samples of a batch of {len(batch)}")


def _modules(subject: Subject) -> dict[str, nn.Module]:
    loss = {"loss": subject.loss} if isinstance(subject.loss, nn.Module) else {}
    return loss | subject.watched


def _modes(modules: dict[str, nn.Module]) -> list[bool]:
    return [module.training for root in modules.values() for module in root.modules()]


def _require_unchanged(before: dict[str, object], after: dict[str, object], where: str) -> None:
    names = changed(before, after)
    require(not names, f"the loss changed {', '.join(names)} {where}")
