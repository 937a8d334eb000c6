"""A checkpoint that version 0.1.0 wrote loads, computes what it did there, and goes on as it did there.

It holds a converted model (six features, ten labels on ten prototypes in dimension 4), an assigner with a momentum, one
that sums ("plain"), and the criterion, saved between two assignment steps; and what the model answered, and what the
next step chose.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hyperproto import DynamicAssigner, LongTailLoss, convert_model

CHECKPOINT = Path(__file__).parent / "data" / "checkpoint_0.1.0.pt"


@pytest.fixture
def saved() -> dict[str, dict[str, Tensor]]:
    return torch.load(CHECKPOINT, weights_only=True)


def fresh() -> nn.Module:
    """The model of the checkpoint before it was trained; its bank is the same."""
    return convert_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10)), dim=4, classifier="2", seed=3)


def test_the_model_computes_what_it_did(saved):
    model = fresh().eval()
    model.load_state_dict(saved["model"], strict=True)
    torch.testing.assert_close(model(saved["inputs"]), saved["logits"])
    assert torch.equal(model[2].assignment, saved["model"]["2.assignment"])


@pytest.mark.parametrize("through", ["assigner", "criterion"])
def test_the_assigner_goes_on_as_it_did(saved, through):
    model = fresh()
    assigner = DynamicAssigner(model)
    criterion = LongTailLoss(assigner, class_counts=torch.arange(1, 11))
    model.load_state_dict(saved["model"], strict=True)
    (assigner if through == "assigner" else criterion).load_state_dict(saved[through], strict=True)
    step = assigner.step()
    assert step.changed == int((saved["next_assignment"] != saved["model"]["2.assignment"]).sum()) > 0
    assert torch.equal(model[2].assignment, saved["next_assignment"])
    torch.testing.assert_close(assigner.class_means, saved["next_means"])


def test_an_assigner_that_sums_comes_back(saved):
    model = fresh()
    assigner = DynamicAssigner(model, momentum=None)
    assigner.load_state_dict(saved["plain_assigner"], strict=True)
    present = {name: value.tolist() for name, value in assigner.state_dict().items()}
    assert present | {"format_version": 1} == {name: value.tolist() for name, value in saved["plain_assigner"].items()}
