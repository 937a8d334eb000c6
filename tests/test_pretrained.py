"""Whole models: a plain model from a converted one's checkpoint, and folders that hold all that a model is."""

import copy
import json
import pickle
import re
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from compatible import MODELS, NUM_CLASSES, converted, images, permute_, plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hyperproto
from hyperproto import (
    AlreadyConvertedError,
    ArgumentError,
    AssignmentError,
    BankError,
    CheckpointError,
    HeadNotFoundError,
    HyperprotoError,
    HyperprotoWarning,
    LabelError,
    PrototypeBank,
    check_class_names,
    compress_head,
    convert_model,
    describe,
    fit_head,
    fit_logit_scale,
    get_heads,
    load_model,
    load_pretrained,
    restore_model,
    save_pretrained,
)
from hyperproto.constructions import CONSTRUCTIONS

OLD = Path(__file__).parent / "data" / "checkpoint_0.1.0.pt"
NAMES = tuple(f"class {label}" for label in range(6))


def perceptron(num_classes: int = 6) -> nn.Module:
    layers = OrderedDict(hidden=nn.Linear(12, 16), act=nn.ReLU(), fc=nn.Linear(16, num_classes))
    return nn.Sequential(layers)


def small(**options: object) -> nn.Module:
    """A converted perceptron whose assignment is not the first one."""
    model = convert_model(perceptron(), classifier="fc", **({"dim": 4} | options))
    model.fc.assign_(torch.arange(5, -1, -1))
    return model


def rows(size: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 6
    centres = 3 * torch.randn(6, 12, generator=generator)
    return centres[labels] + 4 * torch.randn(size, 12, generator=generator), labels


def assert_same(model: nn.Module, other: nn.Module, batch: Tensor) -> None:
    assert torch.equal(model.eval()(batch), other.eval()(batch))
    assert model.state_dict().keys() == other.state_dict().keys()


@pytest.fixture
def no_bank_is_built(monkeypatch):
    def build(*_: object, **__: object) -> Tensor:
        raise AssertionError("a bank was built")

    monkeypatch.setattr("hyperproto.bank.CONSTRUCTIONS", dict.fromkeys(CONSTRUCTIONS, build))


# A plain model from a checkpoint


def in_memory(state: dict, folder: Path) -> object:
    return state


def torch_file(state: dict, folder: Path) -> object:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def among_others(state: dict, folder: Path) -> object:
    torch.save({"epoch": 3, "model": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, folder / "last.pth")
    return str(folder / "last.pth")


def wrapped(state: dict, folder: Path) -> object:
    return {f"module._orig_mod.{name}": value for name, value in state.items()}


def safetensors_file(state: dict, folder: Path) -> object:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def safetensors_folder(state: dict, folder: Path) -> object:
    safetensors_file(state, folder)
    return folder


WAYS = [in_memory, torch_file, among_others, wrapped, safetensors_file, safetensors_folder]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_keep_a_checkpoint_is_read(way, tmp_path):
    saved = small()
    model = perceptron(3)  # its own number of classes does not count
    assert load_model(model, way(saved.state_dict(), tmp_path)) is model
    assert_same(model, saved, rows()[0])
    assert torch.equal(model.fc.anchors, saved.fc.anchors)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [in_memory, safetensors_file])
def test_models_of_every_structure(name, way, tmp_path):
    saved = converted(name)
    permute_(saved)
    model = load_model(plain(name), way(saved.state_dict(), tmp_path))
    assert_same(model, saved, images())
    banks = {id(head.bank) for head in get_heads(model).values()}
    assert len(banks) == 1


def test_no_bank_is_built(no_bank_is_built):
    bank = PrototypeBank.from_tensor(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))
    saved = convert_model(nn.Sequential(nn.Linear(8, 1000)), classifier="0", bank=bank).state_dict()
    model = load_model(nn.Sequential(nn.Linear(8, 1000)), saved)
    assert torch.equal(model[0].bank.prototypes, bank.prototypes)


@pytest.mark.slow
def test_loading_takes_no_time(tmp_path):
    bank = PrototypeBank(1000, 64, method="random")
    saved = convert_model(nn.Sequential(nn.Linear(8, 1000)), classifier="0", bank=bank).state_dict()
    start = time.process_time()
    load_model(nn.Sequential(nn.Linear(8, 1000)), torch_file(saved, tmp_path))
    assert time.process_time() - start < 2.0  # the bank alone would take ten


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "none", "dim": 16},
        {"projection": "linear"},
        {"bank": PrototypeBank(9, 4, method="random")},
        {"bank": PrototypeBank.from_class_vectors(torch.randn(6, 9), 4)},
        {"training_output": "embedding"},
    ],
    ids=str,
)
def test_what_a_head_was_made_with_is_read_from_its_entries(options):
    saved = small(**options)
    model = load_model(perceptron(), saved.state_dict())
    assert_same(model, saved, rows()[0])


def test_fitted_and_compressed_heads_load_like_others():
    saved, data = small(dim=5), rows()
    fit_head(saved, data)
    fit_logit_scale(saved, data)
    compress_head(saved, data, dim=3)
    model = load_model(perceptron(), saved.state_dict())
    assert model.fc.dim == 3
    assert float(model.fc.logit_scale) == float(saved.fc.logit_scale)
    assert "fitted or loaded" in describe(model)
    assert_same(model, saved, data[0])


def test_a_model_that_is_built_differently_for_its_head():
    torchvision = pytest.importorskip("torchvision")
    saved = convert_model(torchvision.models.squeezenet1_1(num_classes=6), dim=4)
    assert list(get_heads(saved)) == ["classifier.2"]
    model = load_model(torchvision.models.squeezenet1_1(num_classes=6), saved.state_dict())
    assert_same(model, saved, torch.randn(2, 3, 64, 64))
    assert list(get_heads(model)) == ["classifier.2"]


def test_feature_maps():
    def segmenter() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1))

    saved = convert_model(segmenter(), dim=4, classifier="1")
    assert_same(load_model(segmenter(), saved.state_dict()), saved, torch.randn(2, 3, 7, 7))


class TwoTasks(nn.Module):
    """Two classifiers on one backbone, with as many labels each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(rows).relu()
        return self.first(features), self.second(features)


def test_models_of_several_tasks():
    # The same bank, by its values, and the same assignment: they are two all the same.
    saved = TwoTasks()
    for name in ("first", "second"):
        convert_model(saved, dim=4, classifier=name)
    model = load_model(TwoTasks(), saved.state_dict()).eval()
    assert model.first.bank is not model.second.bank
    for own, expected in zip(model(rows()[0]), saved.eval()(rows()[0]), strict=True):
        assert torch.equal(own, expected)


def test_the_checkpoint_of_the_first_version():
    model = load_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10)), OLD)
    saved = torch.load(OLD, weights_only=True)
    torch.testing.assert_close(model.eval()(saved["inputs"]), saved["logits"])


def test_a_shared_bank_that_was_stored_twice_is_read_as_one():
    name = "deit_tiny_distilled_patch16_224"
    saved = converted(name)
    state = saved.state_dict() | {"head_dist.bank.prototypes": saved.head.bank.prototypes.clone()}
    model = load_model(plain(name), state)
    assert model.head.bank is model.head_dist.bank
    assert_same(model, saved, images())


def test_a_loaded_model_trains_restores_and_keeps_its_device_and_dtype():
    saved = small().half().state_dict()
    model = perceptron().to(torch.bfloat16).train()
    linear = model.fc
    load_model(model, saved)
    assert model.training
    assert model.hidden.weight.dtype == torch.bfloat16
    assert model.fc.logit_scale.dtype == torch.float32
    model(rows()[0].bfloat16()).sum().backward()
    assert restore_model(model).fc is linear


def test_like_makes_the_heads_and_loads_nothing(no_bank_is_built):
    bank = PrototypeBank.from_tensor(torch.randn(7, 4))
    saved = small(bank=bank)
    saved.fc.logit_scale.fill_(5.0)
    model = perceptron()
    before = model.hidden.weight.clone()
    convert_model(model, like=saved.state_dict(), training_output="embedding")
    assert torch.equal(model.hidden.weight, before)
    assert torch.equal(model.fc.bank.prototypes, saved.fc.bank.prototypes)
    assert torch.equal(model.fc.assignment, saved.fc.assignment)
    assert float(model.fc.logit_scale) == 5.0
    assert model.train()(rows()[0]).shape == (48, 4)
    model.load_state_dict(saved.state_dict())
    assert_same(model, saved, rows()[0])


@pytest.mark.parametrize(
    "given",
    [{"dim": 4}, {"num_classes": 6}, {"bank": "random"}, {"classifier": "fc"}, {"projection": "none"}, {"seed": 1}],
    ids=str,
)
def test_what_a_checkpoint_tells_is_not_to_be_told_beside_it(given):
    model = perceptron()
    with pytest.raises(ArgumentError, match="Drop these"):
        convert_model(model, like=small().state_dict(), **given)
    assert not get_heads(model)


# What does not fit, or is not to be believed


def without(name: str) -> object:
    return lambda state: {key: value for key, value in state.items() if key != name}


def replaced(**entries: Tensor) -> object:
    return lambda state: state | {name.replace("__", "."): value for name, value in entries.items()}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (without("hidden.weight"), CheckpointError, "lacks hidden.weight"),
        (without("fc.projection.1.bias"), CheckpointError, "no projection that convert_model makes"),
        (without("fc.bank.prototypes"), CheckpointError, "bank.prototypes is missing, and 0 other heads"),
        (without("fc.assignment"), CheckpointError, "the entries of a HypersphericalHead"),
        (replaced(other=torch.ones(1)), CheckpointError, r"has other\. Make"),
        (replaced(hidden__weight=torch.ones(3, 3)), CheckpointError, r"hidden.weight \(3, 3\) for \(16, 12\)"),
        (replaced(fc__assignment=torch.zeros(6, dtype=torch.int64)), AssignmentError, "more than once"),
        (replaced(fc__assignment=torch.arange(7)), CheckpointError, "not those of one head"),
        (replaced(fc__assignment_record=torch.ones(3)), AssignmentError, "a record of shape"),
        (replaced(fc__bank__prototypes=torch.ones(6, 4)), BankError, "no prototypes"),
        (replaced(fc__bank__prototypes=torch.eye(6)), CheckpointError, "not those of one head"),
        (replaced(fc__logit_scale=torch.tensor(float("nan"))), CheckpointError, "positive and finite"),
        (replaced(fc__format_version=torch.tensor(9)), CheckpointError, "Update hyperproto"),
        (replaced(fc__projection__0__weight=torch.ones(4, 15)), CheckpointError, "features of other widths"),
        (replaced(fc__bank__prototypes=torch.ones(1).expand(10**7, 4)), CheckpointError, "not all there"),
        (replaced(fc__projection__0__weight=torch.ones(1, 1).expand(4, 10**9)), CheckpointError, "not all there"),
        (replaced(fc__bank__prototypes=torch.ones(6, 4, device="meta")), CheckpointError, "no values"),
    ],
)
@pytest.mark.parametrize("way", [in_memory, torch_file])
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(change, error, words, way, tmp_path):
    model = perceptron()
    linear, before = model.fc, copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        load_model(model, way(change(small().state_dict()), tmp_path))
    assert model.fc is linear
    assert not model._load_state_dict_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_second_task_not_fitting_leaves_the_first_as_it_was():
    saved, model = TwoTasks(), TwoTasks()
    for name in ("first", "second"):
        convert_model(saved, dim=4, classifier=name)
    layers = model.first, model.second
    with pytest.raises(CheckpointError, match="features of other widths"):
        load_model(model, saved.state_dict() | {"second.projection.0.weight": torch.ones(4, 9)})
    assert (model.first, model.second) == layers


def test_a_head_at_another_place_is_refused():
    with pytest.raises(HyperprotoError):
        load_model(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)), small().state_dict())
    with pytest.raises(CheckpointError, match=r"other widths, \{'fc': 96\}, than .* \{'head': 64\}"):
        load_model(plain("test_vit"), converted("test_resnet").state_dict())


def test_a_converted_model_is_not_converted_again():
    model = small()
    with pytest.raises(AlreadyConvertedError):
        load_model(model, small().state_dict())
    assert list(get_heads(model)) == ["fc"]


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched"),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small().state_dict(), "more": Malice()}, "malice.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malice()))
    for file in ("malice.pt", "pickle.pt"):
        with pytest.raises(CheckpointError):
            load_model(perceptron(), file)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 9, 600])
def test_files_that_are_cut_off_are_refused(name, keep, tmp_path):
    whole = (torch_file if name.endswith("pt") else safetensors_file)(small().state_dict(), tmp_path)
    whole.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        load_model(perceptron(), whole)


@pytest.mark.parametrize("got", ["there/is/none.pt", 3, None, perceptron()], ids=str)
def test_what_is_no_checkpoint(got):
    with pytest.raises((CheckpointError, ArgumentError), match="expected"):
        load_model(perceptron(), got)


def test_a_plain_checkpoint_and_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"NAME\.assignment"):
        load_model(perceptron(), perceptron().state_dict())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(perceptron(), tmp_path)


def test_a_checkpoint_of_a_model_and_its_average_asks_which():
    with pytest.raises(CheckpointError, match="'model', 'average'"):
        load_model(perceptron(), {"model": small().state_dict(), "average": small().state_dict()})


# Names of classes


def test_names_from_a_list_or_a_data_set():
    folder = SimpleNamespace(classes=list(NAMES), class_to_idx={name: label for label, name in enumerate(NAMES)})
    for given in (
        list(NAMES),
        NAMES,
        folder,
        SimpleNamespace(dataset=folder),
        SimpleNamespace(dataset=SimpleNamespace(dataset=folder)),
    ):
        model = small(class_names=given)
        assert model.fc.class_names == NAMES
        assert "classes: 0 class 0, 1 class 1, 2 class 2, ... 5 class 5" in describe(model)
        check_class_names(model, folder)
    assert small().fc.class_names is None


def test_names_of_an_image_folder(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("dog", "ant", "cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    folder = datasets.ImageFolder(tmp_path)
    model = convert_model(nn.Sequential(nn.Linear(8, 3)), dim=2, classifier="0", class_names=folder)
    assert model[0].class_names == ("ant", "cat", "dog")
    check_class_names(model, torch.utils.data.DataLoader(torch.utils.data.Subset(folder, [0, 2])))
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "0.png").touch()
    with pytest.raises(LabelError, match="expected 3 class_names, one for each label, got 4"):
        check_class_names(model, datasets.ImageFolder(tmp_path))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (list(NAMES[:5]), "expected 6 class_names"),
        (["a"] * 6, r"several \['a'\]"),
        (range(6), "in the order of the labels"),
        ("abcdef", "in the order of the labels"),
        ({"a": 0}, "in the order of the labels"),
        ([1, 2, 3, 4, 5, 6], "in the order of the labels"),
    ],
)
def test_names_that_are_none_are_refused(names, words):
    model = perceptron()
    with pytest.raises(LabelError, match=words):
        convert_model(model, dim=4, classifier="fc", class_names=names)
    assert not get_heads(model)


def test_a_data_set_in_another_order_is_refused():
    model = small(class_names=NAMES)
    swapped = [NAMES[0], NAMES[2], NAMES[1], *NAMES[3:]]
    with pytest.raises(LabelError, match="label 1 to be 'class 1', as the model has it, got 'class 2'"):
        check_class_names(model, swapped)
    with pytest.raises(LabelError, match="both have class names"):
        check_class_names(small(), swapped)
    with pytest.raises(HeadNotFoundError):
        check_class_names(perceptron(), swapped)


FITS = {
    "fit_head": hyperproto.fit_head,
    "class vectors": lambda model, data: hyperproto.fit_head(model, data, bank="class-vectors"),
    "refit_head": hyperproto.refit_head,
    "compress_head": lambda model, data: compress_head(model, data, dim=3),
    "fit_logit_scale": hyperproto.fit_logit_scale,
}


def named(names: object, **others: object) -> TensorDataset:
    """A data set that says what its classes are called."""
    data = TensorDataset(*rows())
    data.__dict__ |= {"classes": names, **others}
    return data


SWAPPED = [NAMES[0], NAMES[2], NAMES[1], *NAMES[3:]]
WRONG = {
    "swapped": named(SWAPPED),
    "by number": named({name: label for label, name in enumerate(SWAPPED)}),
    "in a loader": DataLoader(named(SWAPPED), batch_size=12),
    "in parts": DataLoader(Subset(named(SWAPPED), range(24)), batch_size=12),
    "one more": named(["another", *NAMES]),
    "one less": named(NAMES[1:]),
    "one renamed": named([*NAMES[1:], "zebra"]),
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_fit_refuses_data_whose_classes_have_other_labels(fit, kind):
    model = small(class_names=NAMES)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LabelError, match=r"expected label \d to be 'class \d', as the model has it, got"):
        FITS[fit](model, WRONG[kind])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "names", [list(NAMES), NAMES[:5], [f"n0{label}" for label in range(6)], [], "abc", [1, 2], None]
)
def test_a_fit_takes_data_whose_names_say_nothing_against_it(names):
    """The same names, the first of them, names of another kind for each, or none."""
    hyperproto.fit_head(small(class_names=NAMES), named(names))
    hyperproto.fit_head(small(), named(names))


def test_a_fit_takes_data_that_are_numbered_anew():
    hyperproto.fit_head(small(class_names=NAMES), named(SWAPPED, target_transform=lambda label: label))


def test_names_stay_with_the_head_that_takes_the_place_of_another():
    model = small(class_names=NAMES)
    compress_head(model, rows(), dim=3)
    assert model.fc.class_names == copy.deepcopy(model).fc.class_names == NAMES


# Folders

FRESH = """
import sys, torch, hyperproto
torch.set_num_threads(int(sys.argv[1]))  # sums are of the same order then
before = torch.get_rng_state()
for folder in sys.argv[2:]:
    model = hyperproto.load_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())
    torch.save({"logits": model(torch.load(f"{folder}/batch.pt")), "state": model.state_dict(),
                "described": hyperproto.describe(model)}, f"{folder}/out.pt")
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path):
    names = [f"n{label}" for label in range(NUM_CLASSES)]
    saved, batches = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = convert_model(timm.create_model("test_resnet", num_classes=NUM_CLASSES), dim=5, class_names=names)
        permute_(model)
        folder = tmp_path / str(dtype)
        saved[folder], batches[folder] = model.to(dtype).train(), images().to(dtype)
        save_pretrained(model, folder)
        torch.save(batches[folder], folder / "batch.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(torch.get_num_threads()), *map(str, saved)], check=True)
    for folder, model in saved.items():
        out = torch.load(folder / "out.pt", weights_only=True)
        assert torch.equal(out["logits"], model.eval()(batches[folder]))
        for name, value in model.state_dict().items():
            assert torch.equal(out["state"][name], value)
            assert out["state"][name].dtype == value.dtype
        assert out["described"] == describe(model)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "deit_tiny_distilled_patch16_224"])
def test_models_by_their_name_in_timm(name, tmp_path):
    saved = convert_model(timm.create_model(name, num_classes=7), dim=5, training_output="embedding")
    save_pretrained(saved, tmp_path)
    model = load_pretrained(tmp_path)
    batch = torch.randn(1, *saved.pretrained_cfg["input_size"])
    assert_same(model, saved, batch)
    assert {head.training_output for head in get_heads(model).values()} == {"embedding"}
    assert {head.bank.method for head in get_heads(model).values()} == {"orthoplex"}


@pytest.mark.parametrize(
    ("options", "words"),
    [({"in_chans": 1}, r"in_chan.* is 1 here and 3 there"), ({"global_pool": "max"}, "pool_type is 'max'")],
)
def test_models_that_a_name_does_not_make_are_told(options, words, tmp_path):
    def factory() -> nn.Module:
        return timm.create_model("resnet10t", num_classes=NUM_CLASSES, **options)

    saved = convert_model(factory(), dim=5)
    with pytest.warns(HyperprotoWarning, match=words):
        save_pretrained(saved, tmp_path)
    with pytest.raises(CheckpointError, match="factory"):
        load_pretrained(tmp_path)
    batch = torch.randn(2, options.get("in_chans", 3), 32, 32)
    assert_same(load_pretrained(tmp_path, factory=factory), saved, batch)


def test_other_models_by_a_factory(tmp_path):
    saved = small(class_names=NAMES)
    save_pretrained(saved, tmp_path, normalisation={"mean": (0.5,), "std": [0.25]})
    model = load_pretrained(tmp_path, perceptron)
    assert_same(model, saved, rows()[0])
    assert model.fc.class_names == NAMES
    check_class_names(model, list(NAMES))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] is None
    assert config["class_names"] == list(NAMES)
    assert config["normalisation"] == {"mean": [0.5], "std": [0.25]}
    assert load_model(perceptron(), tmp_path).fc.class_names is None


def test_tasks_keep_the_names_of_their_own_classes(tmp_path):
    saved = TwoTasks()
    for name in ("first", "second"):
        convert_model(saved, dim=4, classifier=name, class_names=[f"{name} {label}" for label in range(6)])
    save_pretrained(saved, tmp_path)
    model = load_pretrained(tmp_path, TwoTasks)
    assert model.first.class_names == saved.first.class_names
    assert model.second.class_names == saved.second.class_names


def test_the_normalisation_of_a_timm_model_comes_back(tmp_path):
    saved = convert_model(timm.create_model("test_resnet", num_classes=6), dim=4)
    save_pretrained(saved, tmp_path, normalisation={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    resolved = timm.data.resolve_model_data_config(load_pretrained(tmp_path))
    assert resolved["mean"] == (0.1, 0.2, 0.3)
    assert resolved["std"] == (0.4, 0.5, 0.6)
    with pytest.raises(ArgumentError, match="'url'"):
        save_pretrained(saved, tmp_path, normalisation={"url": "x"})


def test_the_card_tells_bank_scale_and_fits(tmp_path):
    model, data = small(class_names=NAMES), rows()
    fit = fit_head(model, data)
    scale = fit_logit_scale(model, data)
    save_pretrained(model, tmp_path, fits=[fit])
    card = (tmp_path / "README.md").read_text()
    for text in (str(model.fc.bank.report()), str(fit), f"{scale:.6g}", describe(model), "0 class 0"):
        assert text in card


def test_a_folder_is_written_again_and_a_plain_model_is_not(tmp_path):
    for order in (torch.arange(6), torch.arange(5, -1, -1)):
        model = small()
        model.fc.assign_(order)
        save_pretrained(model, tmp_path / "new" / "folder")
        assert torch.equal(load_pretrained(tmp_path / "new" / "folder", perceptron).fc.assignment, order)
    with pytest.raises(HeadNotFoundError, match="was not converted"):
        save_pretrained(perceptron(), tmp_path)
    with pytest.raises(HeadNotFoundError, match=r"save_pretrained\(model\.module\)"):
        save_pretrained(nn.DataParallel(small()), tmp_path)
    with pytest.raises(ArgumentError, match="device meta"):
        save_pretrained(small().to("meta"), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "os.system"}, "installed timm"),
        ({"architecture": "local-dir:/tmp"}, "installed timm"),
        ({"architecture": "vit_giant_patch14_224"}, "not those of timm's|of other widths"),
        ({"architecture": 3}, "no such architecture"),
        ({"num_classes": 10**9}, "of two models"),
        ({"dtype": "int8"}, "no such dtype"),
        ({"class_names": [1, 2]}, "no such class_names"),
        ({"class_names": ["only one"]}, "expected 6 class_names"),
        ({"heads": {"fc": {"training_output": "__import__"}}}, "no such heads"),
        ({"normalisation": {"url": "x"}}, "no such normalisation"),
        ({"format": 99}, "Update hyperproto"),
    ],
)
def test_a_configuration_is_not_believed(change, words, tmp_path):
    save_pretrained(convert_model(timm.create_model("test_resnet", num_classes=6), dim=4), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HyperprotoError, match=words):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"model_type": "vit"}', "[" * 10**5])
def test_files_that_are_no_configuration(text, tmp_path):
    safetensors_file(small().state_dict(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"load_model|damaged"):
        load_pretrained(tmp_path, perceptron)


# The page


def blocks(heading: str) -> list[str]:
    text = (Path(__file__).parents[1] / "docs/whole_models.md").read_text().split(f"\n## {heading}\n")[1]
    return re.findall(r"```python\n(.*?)```", text.split("\n## ")[0], flags=re.DOTALL)


class Folder(torch.utils.data.TensorDataset):
    classes = ("daisy", "rose", "tulip", "violet")


@pytest.mark.parametrize("heading", ["From a checkpoint", "In a folder", "Built without values"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:fit_head")
def test_the_page_runs(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Folder(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    space = {"hyperproto": hyperproto, "timm": timm, "train_set": data, "test_set": data, "images": data.tensors[0]}
    if heading == "From a checkpoint":
        saved = convert_model(timm.create_model("resnet18", num_classes=6), dim=4)
        torch.save({"model": saved.state_dict(), "epoch": 3}, "last.pt")
        first, second = blocks(heading)
        exec(first, space)
        assert torch.equal(space["model"].eval()(data.tensors[0]), saved.eval()(data.tensors[0]))
        exec(second, space | {"model": timm.create_model("resnet18")})
    elif heading == "In a folder":
        torchvision = space["torchvision"] = pytest.importorskip("torchvision")
        other = convert_model(torchvision.models.squeezenet1_1(), dim=8, bank="random", projection="linear")
        save_pretrained(other, "other")
        for block in blocks(heading):
            exec(block, space)
            if "predicted" in block:
                assert set(space["predicted"]) <= set(Folder.classes)
        assert list(get_heads(space["model"])) == ["classifier.2"]
    else:
        transformers = space["transformers"] = pytest.importorskip("transformers")
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
        config = transformers.ViTConfig(hidden_size=16, patch_size=4, num_labels=6, **sizes)
        transformers.ViTForImageClassification(config).save_pretrained("plain")
        [block] = blocks(heading)
        exec(block, space | {"plain_folder": "plain", "folder": "own"})
        head = load_model(transformers.ViTForImageClassification(config), "own").classifier
        assert sorted(head.assignment.tolist()) == list(range(6))
