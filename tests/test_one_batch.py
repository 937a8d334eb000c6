"""The way of one batch: each question is asked once."""

import pytest
import torch
from torch import nn

from hyperproto import (
    BalancedLoss,
    BankError,
    DynamicAssigner,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    ShapeError,
    fit_logit_scale,
)
from hyperproto.codebook import Codebook

# Tiny data: the scale has no best value, or a bound is the best.
pytestmark = pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning")


LOSSES = [BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss]


def counted(monkeypatch, owner: object, name: str) -> list[None]:
    calls, function = [], getattr(owner, name)

    def counting(*arguments, **options):
        calls.append(None)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize("make_loss", LOSSES)
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_criterion_looks_at_output_and_target_once(monkeypatch, make_loss, training_output, soft):
    head = HypersphericalHead(6, 5, dim=3, training_output=training_output)
    criterion = make_loss(DynamicAssigner(head))
    target = torch.arange(5)
    target = nn.functional.one_hot(target, 5).float() if soft else target
    output = head(torch.randn(5, 6))
    reads = counted(monkeypatch, Codebook, "read")
    looks = counted(monkeypatch, torch, "aminmax")
    criterion(output, target).backward()
    assert len(reads) == 1
    assert len(looks) == 1, "passes over the values of the target"
    assert criterion.assigner.class_counts.sum() == 5


def test_a_scale_is_not_fitted_to_outputs_of_another_number_of_classes():
    model = nn.Sequential(HypersphericalHead(8, 12, dim=4))
    wide = nn.Sequential(HypersphericalHead(8, 6, dim=4), nn.Linear(6, 12))
    fit_logit_scale(model, [(torch.randn(3, 8), torch.tensor([0, 1, 2]))])
    with pytest.raises(ShapeError, match=r"logits of shape \(B, 6\).*got \(3, 12\)"):
        fit_logit_scale(wide, [(torch.randn(3, 8), torch.tensor([0, 1, 2]))])


@pytest.mark.parametrize("factor", [5.0, 0.0, float("nan")])
def test_a_bank_by_itself_takes_unit_rows_only(factor):
    bank, other = PrototypeBank(6, 4), PrototypeBank(6, 4, seed=1)
    before = bank.prototypes.clone()
    with pytest.raises(BankError, match="no prototypes"):
        bank.load_state_dict({"prototypes": factor * other.prototypes})
    assert torch.equal(bank.prototypes, before)
    bank.load_state_dict(other.state_dict())
    assert torch.equal(bank.prototypes, other.prototypes)


def test_a_bank_without_values_takes_unit_rows_only():
    bank = PrototypeBank(6, 4)
    rows = bank.prototypes.clone()
    bank.to_empty(device="cpu")
    with pytest.raises(BankError, match="no prototypes"):
        bank.load_state_dict({"prototypes": 2.0 * rows})
    bank.load_state_dict({"prototypes": rows})
    assert torch.equal(bank.prototypes, rows)
