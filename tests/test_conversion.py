"""Models in and out: the classifier replaced in place, and put back bit for bit."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from compatible import needs, needs_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from hyperproto import (
    AlreadyConvertedError,
    BalancedLoss,
    BankError,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    PrototypeBank,
    convert_model,
    get_heads,
    restore_model,
    to_linear,
)

#: One model of each way in which timm names a plain nn.Linear classifier, as small as there is.
TIMM_MODELS = [
    "test_resnet",  # fc
    "test_vit",  # head
    "test_efficientnet",  # classifier
    "test_convnext",  # head.fc
    "inception_next_atto",  # head.fc2
]


def make(name: str, num_classes: int = 10) -> nn.Module:
    needs_model(name)
    return timm.create_model(name, num_classes=num_classes)


def image(model: nn.Module, num: int = 2) -> torch.Tensor:
    return torch.randn(num, *model.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_models_convert_train_and_come_back(name):
    model = make(name).eval()
    images = image(model)
    state, before = copy.deepcopy(model.state_dict()), model(images)

    assert convert_model(model, dim=5) is model
    [(path, head)] = get_heads(model).items()
    assert model.get_classifier() is head
    assert not head.training
    assert model(images).shape == (2, 10)
    for key, value in model.state_dict().items():
        assert key.startswith(f"{path}.") or torch.equal(value, state[key])

    model.train()
    assigner = DynamicAssigner(model)
    loss = BalancedLoss(assigner)(model(images), torch.tensor([0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert head.projection[0].weight.grad is not None
    assert assigner.step().unseen == tuple(range(2, 10))

    model.eval()
    model.load_state_dict(state, strict=False)  # batch norm has seen a batch
    assert restore_model(model) is model
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(model(images), before)
    assert not get_heads(model)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.2"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
        ("densenet121", "classifier"),
        ("efficientnet_b0", "classifier.1"),
        ("alexnet", "classifier.6"),
    ],
)
def test_torchvision_models_convert(name, path):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
    before = dict(model.named_modules())
    convert_model(model, dim=5)
    assert list(get_heads(model)) == [path]
    assert model.eval()(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 10)
    restore_model(model)
    assert dict(model.named_modules()) == before


def test_every_torchvision_class_is_where_the_table_says():
    from hyperproto.conversion.locate import TORCHVISION_CLASSIFIERS

    seen = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        if builder.__module__ in {kind.__module__ for kind in seen.values()}:
            continue  # one of each file will do
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("cpu" if "regnet" in name else "meta"):  # regnet computes its widths with tensors
            model = torchvision.models.get_model(name, num_classes=7, **extra)
        seen[name] = type(model)
        leaf = model.get_submodule(TORCHVISION_CLASSIFIERS[type(model).__name__])
        assert 7 in (getattr(leaf, "out_features", None), getattr(leaf, "out_channels", None)), name
    assert {kind.__name__ for kind in seen.values()} <= set(TORCHVISION_CLASSIFIERS)
    assert len(seen) >= 15


def test_num_classes_can_change_and_comes_back():
    model = make("test_convnext", num_classes=10)
    convert_model(model, dim=5, num_classes=7)
    assert model.num_classes == 7
    [head] = get_heads(model).values()
    assert head.num_classes == 7
    assert model.eval()(image(model)).shape == (2, 7)
    assert restore_model(model).num_classes == 10


def test_any_module_with_the_name_given():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    last = model[3]
    convert_model(model, dim=3, classifier="3")
    assert isinstance(model[3], HypersphericalHead)
    assert restore_model(model)[3] is last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_device_and_dtype_are_kept(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(dtype)
    convert_model(model, dim=3, classifier="1")
    assert {parameter.dtype for parameter in model[1].projection[0].parameters()} == {dtype}
    assert model[1].bank.prototypes.dtype == torch.float32
    assert model(torch.randn(2, 12, dtype=dtype)).shape == (2, 4)
    model = convert_model(make("test_resnet").to("meta"), dim=5)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_first_user_of_a_bank_keeps_it_and_later_ones_have_a_copy():
    bank = PrototypeBank(12, 5)
    first, second = (next(iter(get_heads(convert_model(make("test_resnet"), bank=bank)).values())) for _ in range(2))
    twin = HypersphericalHead(16, 10, bank=copy.deepcopy(first).bank)
    assert first.bank is bank
    assert torch.equal(second.bank.prototypes, bank.prototypes)
    first.to("meta")
    for head in (second, twin):
        assert head.embed(torch.randn(2, head.in_features)).device == head.class_prototypes.device


def test_seeds():
    models = [nn.Sequential(nn.Linear(4, 9)) for _ in range(2)]
    state = torch.get_rng_state()
    first, second = (convert_model(model, classifier="0", seed=3) for model in models)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first[0].buffers(), second[0].buffers(), strict=True))
    assert torch.equal(first[0].projection[0].weight, second[0].projection[0].weight)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_converted_models_can_be_restored(copier):
    model = convert_model(make("test_resnet"), dim=5).eval()
    twin = copier(model)
    images = image(model)
    assert torch.equal(twin(images), model(images))
    restore_model(twin)
    assert not get_heads(twin)
    assert get_heads(model)


def test_embedding_output():
    model = convert_model(make("test_resnet"), dim=5, training_output="embedding")
    assert model.train()(image(model)).shape == (2, 5)
    assert model.eval()(image(model)).shape == (2, 10)


# Bad input: a clear error, and the model as it was


@pytest.mark.parametrize(
    ("build", "kwargs", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 2)), {}, "dotted.name"),
        (lambda: nn.Sequential(nn.Linear(4, 2)), {"classifier": "1"}, "no module named '1'"),
        (lambda: nn.Sequential(nn.ReLU()), {"classifier": "0"}, "expected '0' of Sequential to be .*got ReLU"),
        (lambda: nn.Sequential(nn.Conv2d(4, 2, 3)), {"classifier": "0"}, "Conv2d of size 1, got Conv2d"),
        pytest.param(
            lambda: make("test_convnext"),
            {"classifier": "head"},
            "such as 'head.fc'",
            marks=needs("a ConvNeXt that can be made on the meta device", timm="1.0.26"),
        ),
        (lambda: make("test_resnet", 0), {}, "num_classes=K"),
        (lambda: timm.create_model("resnet18", features_only=True), {}, "FeatureListNet.*dotted.name"),
        (lambda: make("gemma4_vit_167m_enc"), {}, "Gemma4VitEncoder.*dotted.name"),
    ],
)
def test_models_without_a_classifier_are_refused(build, kwargs, words):
    with torch.device("meta"):
        model = build()
    before = list(model.named_modules())
    with pytest.raises(HeadNotFoundError, match=words):
        convert_model(model, **({"dim": 5} | kwargs))
    assert list(model.named_modules()) == before


def test_a_classifier_put_in_by_hand_is_found():
    model = make("test_resnet")
    model.fc = nn.Linear(model.fc.in_features, 6)  # the model goes on saying num_classes == 10
    convert_model(model, dim=5)
    assert model.fc.num_classes == model.num_classes == 6
    assert restore_model(model).num_classes == 10


def test_converting_twice_is_refused():
    model = convert_model(make("test_resnet"), dim=5)
    head = model.fc
    with pytest.raises(AlreadyConvertedError, match="restore_model"):
        convert_model(model, dim=5)
    assert model.fc is head


def test_a_bank_that_does_not_fit_leaves_the_model():
    model = make("test_resnet")
    linear = model.fc
    for bank in (PrototypeBank(9, 5), PrototypeBank(10, 6)):
        with pytest.raises(BankError):
            convert_model(model, dim=5, bank=bank)
    assert model.fc is linear
    with pytest.raises(HeadNotFoundError, match="nothing to restore"):
        restore_model(model)


def test_folding_keeps_a_synchronised_batch_norm():
    model = convert_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), dim=3, classifier="1")
    features = torch.randn(40, 12)
    for _ in range(5):
        model(3.0 * features + 1.0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    expected = model(features).argmax(dim=1)
    assert torch.equal(to_linear(model)(features).argmax(dim=1), expected)


CHANGED = {
    "pruned": lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),
    "parametrised": lambda model: parametrizations.weight_norm(model[0]),
    "replaced": lambda model: model.__setitem__(0, nn.Linear(7, 16, dtype=torch.float16)),
    "taken out": lambda model: model.__setitem__(0, nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("undo", [to_linear, restore_model])
def test_what_comes_back_has_the_models_dtype_whatever_became_of_its_other_layers(undo, change):
    model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 6))
    convert_model(model, classifier="2", projection="none").half().eval()
    CHANGED[change](model)
    # torch copies no weight that a forward pass has computed.
    for each in (model,) if change == "pruned" else (copy.deepcopy(model), model):
        undo(each)
        # Where nothing tells, in float32 as the head is.
        assert each[2].weight.dtype == (torch.float32 if change == "taken out" else torch.float16)
