"""The layer that is converted is the one whose output the model returns, or an error says what to name."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto import HeadNotFoundError, convert_model, get_heads


class Body(nn.Module):
    """Features, a classifier, and something done to its output."""

    def __init__(self, after=lambda logits: logits) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        self.fc = nn.Linear(16, 8)
        self.after = after

    def forward(self, inputs: Tensor) -> object:
        return self.after(self.fc(self.features(inputs)))


class Adapted(nn.Module):
    """A layer and an addition to it that starts at zero."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(16, 8))
        self.name = name
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        return self.get_submodule(self.name)(features) + self.up(self.down(features))


def refuse(model: nn.Module, classifier: str | None, match: str) -> None:
    before, state = dict(model.named_modules()), torch.get_rng_state()
    with pytest.raises(HeadNotFoundError, match=match):
        convert_model(model, classifier=classifier, dim=4)
    assert dict(model.named_modules()) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "behind", [nn.LogSoftmax(1), nn.Softmax(1), nn.Sigmoid(), nn.ReLU(), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 8)]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_behind_the_classifier_is_seen_in_a_sequential(behind, device):
    model = nn.Sequential(nn.Linear(5, 16), nn.Sequential(nn.Linear(16, 8)), nn.Sequential(behind)).to(device)
    refuse(model, "1.0", type(behind).__name__)


@pytest.mark.parametrize("behind", [nn.Dropout(), nn.Flatten(), nn.Identity(), nn.Sequential(nn.Dropout())])
def test_what_changes_no_cosine_may_stand_behind(behind):
    convert_model(nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 8), behind), classifier="1", dim=4)


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: F.log_softmax(logits, dim=1),
        torch.tanh,
        F.relu,
        lambda logits: 20.0 * logits,
        lambda logits: logits + 1.0,
        lambda logits: -logits,
        lambda logits: logits.flip(1),
        lambda logits: {"logits": logits.sigmoid()},
    ],
)
def test_what_a_forward_does_afterwards_is_seen_by_a_run(after):
    refuse(Body(after), "fc", "have to come out as they are")


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits,
        lambda logits: F.dropout(logits, training=False),
        lambda logits: (logits, logits.softmax(1)),
        lambda logits: {"logits": logits},
        lambda logits: (logits + logits) / 2,
        lambda logits: torch.stack([logits, logits]).mean(dim=0),
    ],
)
def test_outputs_that_are_the_heads_are_taken(after):
    convert_model(Body(after), classifier="fc", dim=4)


class Tokens(Body):
    """One set of logits for each of four parts of the input, put together in the end."""

    def forward(self, inputs: Tensor) -> object:
        parts = torch.stack([self.features(inputs + shift) for shift in range(4)], dim=1)
        return self.after(self.fc(parts))


def test_a_mean_over_tokens_is_taken_and_a_maximum_is_not():
    convert_model(Tokens(lambda logits: logits.mean(dim=1)), classifier="fc", dim=4)
    refuse(Tokens(lambda logits: logits.amax(dim=1)), "fc", "as they are")


def test_adapters_that_start_at_zero_are_seen():
    model = Body()
    model.fc = Adapted("base_layer")
    refuse(model, "fc.base_layer", "Merge or remove")
    refuse(model, "fc", "Merge or remove")
    model.fc = Adapted("inner")
    refuse(model, "fc.inner", "merge adapters")


def test_an_adapter_around_timms_classifier_is_refused():
    model = timm.create_model("test_resnet", num_classes=8)
    layer, model.fc = model.fc, Adapted("base_layer")
    model.fc.base_layer = layer
    refuse(model, None, "Merge or remove")


@pytest.mark.parametrize("hidden", [6, 8, 20])
def test_of_layers_appended_to_timms_classifier_the_last_one_is_replaced(hidden):
    model = timm.create_model("test_resnet", num_classes=20)
    model.fc = nn.Sequential(model.fc, nn.ReLU(), nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 6))
    convert_model(model, dim=5)
    assert list(get_heads(model)) == ["fc.4"]
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 6)


def test_an_activation_appended_to_timms_classifier_is_refused():
    model = timm.create_model("test_resnet", num_classes=20)
    model.fc = nn.Sequential(model.fc, nn.LogSoftmax(1))
    refuse(model, None, "LogSoftmax")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_models_inside_other_modules_are_run_on_their_own_size(name):
    class Outer(nn.Module):
        def __init__(self, after) -> None:
            super().__init__()
            self.backbone, self.after = timm.create_model(name, num_classes=8), after

        def forward(self, inputs: Tensor) -> Tensor:
            return self.after(self.backbone(inputs))

    layer = {"test_resnet": "backbone.fc", "test_vit": "backbone.head"}[name]
    convert_model(Outer(nn.Identity()), classifier=layer, dim=4)
    refuse(Outer(nn.Softmax(dim=1)), layer, "as they are")


def test_a_run_changes_nothing_and_calls_no_hook():
    calls = []
    model = Body(lambda logits: logits).train()
    model.features.insert(1, nn.BatchNorm1d(16))
    model.features[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.features.state_dict().items()}
    state = torch.get_rng_state()
    convert_model(model, classifier="fc", dim=4)
    assert not calls
    assert model.training
    assert model.features[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.features.state_dict().items())


def test_a_model_that_no_input_can_be_made_for_is_converted_as_before():
    class Pair(Body):
        def forward(self, inputs: Tensor, more: Tensor) -> object:
            return super().forward(inputs + more)

    convert_model(Pair(), classifier="fc", dim=4)
