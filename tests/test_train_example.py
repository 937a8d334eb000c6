"""examples/train.py: its heads, its result lines, exact resumption, and its data against slow oracles."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from compatible import in_front
from PIL import Image

import hyperproto
from hyperproto.fitting import compress_head, refit_head

# So few images are all told apart, before the refit and by the held-out ones; both fits say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:refit_head:hyperproto.HyperprotoWarning"),
    pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning"),
]

ROOT = Path(__file__).parents[1]
NUM_CLASSES, TRAIN_IMAGES, TEST_IMAGES = 4, 12, 5
TINY = [
    "--model",
    "cifar_resnet8",
    "--width",
    "8",
    "--lr",
    "0.02",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--holdout",
    "0.1",
    "--quiet",
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


data, cifar_resnet, softmax = load("_data"), load("_cifar_resnet"), load("_softmax")
train = load("train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Class folders of 32 x 32 images: noise around a colour of the class."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    colours = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)]
    for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        for label, colour in enumerate(colours):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                noisy = np.clip(colour + generator.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / split / f"class{label}" / f"{index:02d}.png")
    return root


def run(folder: Path, results: Path, *flags: str) -> dict:
    train.main([str(folder), *TINY, "--results", str(results), *flags])
    return json.loads(results.read_text().splitlines()[-1])


HEADS = {
    "softmax": ["--head", "softmax"],
    "softmax with a bottleneck": ["--head", "softmax", "--dim", "3", "--projection", "linear"],
    "etf": ["--head", "etf", "--loss", "long-tail"],
    "hpn": ["--head", "hpn", "--dim", "3", "--loss", "balanced", "--reduction", "sum", "--lr", "0.001"],
    "dl2pa": ["--head", "dl2pa", "--dim", "3", "--loss", "balanced", "--start", "random", "--assign-every", "0.5"],
    "dl2pa from data": ["--head", "dl2pa", "--dim", "3", "--start", "data"],
    "recipe": [],
    "recipe in fewer dimensions": ["--final-dim", "3", "--refit", "20"],
}


@pytest.mark.parametrize("head", in_front(HEADS, "softmax", "dl2pa from data", "recipe in fewer dimensions"))
def test_every_head_learns_and_leaves_a_line_that_the_documentation_explains(folder, tmp_path, head):
    flags = HEADS[head]
    result = run(folder, tmp_path / "results.jsonl", *flags, "--epochs", "10")
    assert result["top1"] >= 90.0
    page = (ROOT / "docs" / "training.md").read_text()
    assert all(f"`{key}`" in page for key in result)
    assert result["training_images"] == NUM_CLASSES * (TRAIN_IMAGES - 1)
    # Every class has the same number of test images.
    assert result["top1"] == pytest.approx(np.mean(result["class_accuracy"]), abs=0.01)
    assert result["top1"] == pytest.approx(result["class_mean_accuracy"])
    assert result["tail_accuracy"] == pytest.approx(result["top1"])  # 12 images a class are fewer than 20
    assert result["head_accuracy"] is result["median_accuracy"] is None
    assert result["top5"] == 100.0
    assert (result["start_accuracy"] is not None) == ("data" in flags)
    assert str(tmp_path) not in json.dumps(result)
    assert str(folder.parent) not in json.dumps(result)


def test_a_killed_run_ends_as_the_undisturbed_one(folder, tmp_path, monkeypatch):
    flags = ["--head", "dl2pa", "--dim", "3", "--epochs", "3", "--start", "data", "--refit", "3"]
    flags += ["--mixup", "1", "--ema", "0.9", "--loss", "cross-entropy", "--precision", "fp32"]
    straight = run(folder, tmp_path / "straight.jsonl", *flags, "--output", str(tmp_path / "straight"))

    train_epoch, started = train.Trainer._train_epoch, []

    def kill_in_the_second(trainer, epoch):
        started.append(epoch)
        if len(started) % 2 == 0:
            raise KeyboardInterrupt
        return train_epoch(trainer, epoch)

    flags += ["--output", str(tmp_path / "killed"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_train_epoch", kill_in_the_second)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(folder, tmp_path / "killed.jsonl", *flags)
    assert started == [0, 1, 1, 2]
    killed = run(folder, tmp_path / "killed.jsonl", *flags)

    measured = {"seconds", "fit_seconds", "images_per_second", "peak_memory_mib"}
    assert {k: v for k, v in killed.items() if k not in measured} == {
        k: v for k, v in straight.items() if k not in measured
    }
    first, second = (torch.load(tmp_path / name / "last.pt") for name in ("straight", "killed"))
    assert len(first["history"]) == 3
    for part in ("model", "ema", "assigner"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert (tmp_path / "killed" / "log.jsonl").read_text().count("\n") == 3
    # A finished run is left alone, and a run with other arguments is not mistaken for it.
    run(folder, tmp_path / "killed.jsonl", *flags)
    assert (tmp_path / "killed.jsonl").read_text().count("\n") == 1
    with pytest.raises(SystemExit, match="other arguments: lr"):
        run(folder, tmp_path / "killed.jsonl", *flags, "--lr", "0.03")


FINAL = {
    "softmax": ["--head", "softmax", "--dim", str(NUM_CLASSES)],
    "softmax, then softmax": ["--head", "softmax", "--dim", str(NUM_CLASSES), "--final-dim", "2"],
    "softmax, then a bank": ["--head", "softmax", "--dim", "4", "--final-dim", "3", "--final-bank", "simplex"],
    "simplex": ["--head", "etf"],
    "simplex, then class vectors": ["--head", "etf", "--final-dim", "3"],
    "simplex, then a bank": ["--head", "etf", "--final-dim", "2", "--final-bank", "hpn"],
}  # fmt: skip
final_heads = [
    pytest.param(flags, id=name, marks=[] if name == "simplex, then class vectors" else pytest.mark.slow)
    for name, flags in FINAL.items()
]


@pytest.mark.parametrize("flags", final_heads)
def test_a_final_head_is_made_again_after_a_kill(folder, tmp_path, monkeypatch, flags):
    flags = [*flags, "--epochs", "10", "--refit", "20", "--resume"]
    straight = run(folder, tmp_path / "straight.jsonl", *flags, "--output", str(tmp_path / "straight"))
    assert straight["top1"] >= 90.0

    def kill(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module, name in ((train, "fit_softmax"), (refit_head, "fit_unit_head"), (compress_head, "fit_unit_head")):
            patch.setattr(module, name, kill)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "killed.jsonl", *flags, "--output", str(tmp_path / "killed"))
    killed = run(folder, tmp_path / "killed.jsonl", *flags, "--output", str(tmp_path / "killed"))
    assert killed["class_accuracy"] == straight["class_accuracy"]
    first, second = (torch.load(tmp_path / name / "model.pt") for name in ("straight", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(key.endswith("bank.prototypes") for key in first) == ("etf" in flags or "simplex" in flags)


def trainer_of(folder, *flags: str) -> Any:
    args = train.parse_arguments([str(folder), *TINY, *flags])
    args.num_classes = NUM_CLASSES
    splits = data.read_splits("folder", folder, decoded=True)
    train.seed_everything(0)
    model, device = train.build_model(args), torch.device("cpu")
    return train.Trainer(args, model, train.build_loaders(args, *splits, model, device), device)


def prepared(folder: Path, checkpoint: Path, *flags: str) -> Any:
    """A trainer that has the epochs of a checkpoint behind it."""
    trainer = trainer_of(folder, *flags, "--epochs", "4", "--refit", "40")
    trainer.begin_from(checkpoint)
    return trainer


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> dict[str, Path]:
    """The last checkpoint of a run with each head, in as many dimensions as there are classes."""
    checkpoints = {}
    for head in ("softmax", "etf"):
        output = tmp_path_factory.mktemp(head)
        flags = ["--head", head, "--dim", str(NUM_CLASSES), "--epochs", "4", "--keep-checkpoints"]
        run(folder, output / "results.jsonl", *flags, "--output", str(output))
        assert len(list(output.glob("epoch*.pt"))) == 4
        checkpoints[head] = output / "epoch4.pt"
    return checkpoints


@pytest.mark.parametrize("flags", [*final_heads, pytest.param(["--head", "etf", "--refit", "0"], id="no refit")])
def test_a_run_from_the_epochs_of_another_ends_as_one_that_does_them_itself(folder, trained, tmp_path, flags):
    head, flags = flags[1], ["--refit", "5", *flags, "--dim", str(NUM_CLASSES), "--epochs", "4"]
    alone = run(folder, tmp_path / "alone.jsonl", *flags, "--output", str(tmp_path / "alone"))
    more = ["--output", str(tmp_path / "from"), "--epochs-from", str(trained[head])]
    started = run(folder, tmp_path / "from.jsonl", *flags, *more)
    assert started["arguments"] == alone["arguments"]
    assert started["class_accuracy"] == alone["class_accuracy"]
    first, second = (torch.load(tmp_path / name / "model.pt") for name in ("alone", "from"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_the_epochs_of_a_run_that_trained_the_same_are_taken(folder, trained, tmp_path):
    flags = ["--head", "etf", "--dim", str(NUM_CLASSES), "--refit", "5", "--epochs", "4", "--epochs-from"]
    last, third = str(trained["etf"]), str(trained["etf"].with_name("epoch3.pt"))
    with pytest.raises(SystemExit, match="has other arguments: lr, seed"):
        run(folder, tmp_path / "results.jsonl", *flags, last, "--lr", "0.03", "--seed", "5")
    with pytest.raises(SystemExit, match=r"expected 4 epochs in .*epoch3.pt, got 3"):
        run(folder, tmp_path / "results.jsonl", *flags, third)
    assert not (tmp_path / "results.jsonl").exists()


def test_softmax_of_fewer_dimensions_starts_from_its_principal_components(folder, trained, monkeypatch):
    trainer = prepared(folder, trained["softmax"], *FINAL["softmax, then softmax"])
    logits, _ = trainer.predict(trainer.model, trainer.loaders.fit)
    monkeypatch.setattr(train, "fit_softmax", lambda *arguments, **options: None)
    trainer.fit_final_head()
    found, _ = trainer.predict(trainer.model, trainer.loaders.fit)
    assert trainer.model.fc.vectors.weight.shape == (NUM_CLASSES, 2)
    mean = logits.double().mean(dim=0).numpy()
    centred = logits.double().numpy() - mean
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.numpy(), centred @ directions[:2].T @ directions[:2] + mean, atol=1e-3)
    assert np.abs(found.numpy() - logits.numpy()).max() > 0.02


def test_fitted_class_vectors_become_the_prototypes_of_a_converted_model(folder, trained):
    trainer = prepared(folder, trained["etf"], "--head", "etf", "--dim", str(NUM_CLASSES), "--final-dim", "3")
    backbone = {name: value.clone() for name, value in trainer.model.state_dict().items() if not name.startswith("fc.")}
    before, labels = trainer.predict(trainer.model, trainer.loaders.fit)
    trainer.train()
    after, _ = trainer.predict(trainer.model, trainer.loaders.fit)
    [head] = hyperproto.get_heads(trainer.model).values()
    assert (head.dim, head.num_classes) == (3, NUM_CLASSES)
    assert torch.equal(head.assignment, torch.arange(NUM_CLASSES))
    loss = torch.nn.functional.cross_entropy
    assert loss(after, labels) < loss(before / before.abs().max() * float(head.logit_scale), labels)
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in backbone.items())
    assert {name for name, _ in head.named_parameters()} == {
        f"projection.{n}" for n in ("0.weight", "1.weight", "1.bias")
    }
    assert isinstance(hyperproto.restore_model(trainer.model).fc, torch.nn.Linear)


def test_the_average_of_the_weights_gets_the_final_head(folder, tmp_path):
    flags = ["--head", "etf", "--final-dim", "2", "--refit", "20", "--ema", "0.5", "--epochs", "4"]
    result = run(folder, tmp_path / "results.jsonl", *flags, "--output", str(tmp_path))
    assert result["top1"] >= 70.0
    assert torch.load(tmp_path / "model.pt")["fc.bank.prototypes"].shape == (NUM_CLASSES, 2)


def mean_loss_over_training_images(trainer: Any) -> float:
    """Of the model in eval mode, by PyTorch's own cross-entropy."""
    logits, labels = trainer.predict(trainer.model, trainer.loaders.fit)
    heads = list(hyperproto.get_heads(trainer.model).values())
    scale = trainer.criterion.scale / float(heads[0].logit_scale) if heads else 1.0
    return float(torch.nn.functional.cross_entropy(scale * logits, labels))


@pytest.mark.parametrize("head", ["softmax", "etf"])
def test_refitting_lowers_the_loss_and_moves_nothing_but_the_head(folder, trained, head):
    trainer = prepared(folder, trained[head], "--head", head, "--dim", str(NUM_CLASSES))
    loss = mean_loss_over_training_images(trainer)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.refit()
    assert mean_loss_over_training_images(trainer) < 0.8 * loss
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"fc.projection.0.weight", "fc.projection.1.weight", "fc.projection.1.bias"}
    assert moved == expected | ({"fc.vectors.weight", "fc.vectors.bias"} if trainer.free else {"fc.logit_scale"})


def test_final_heads_that_the_model_cannot_get_are_refused(folder):
    flags = ["--head", "etf", "--refit", "5", "--final-dim"]
    with pytest.raises(SystemExit, match="is for models with one classifier; deit_tiny_distilled_patch16_224 has 2"):
        trainer_of(folder, "--model", "deit_tiny_distilled_patch16_224", *flags, "3")
    for dim in (1, NUM_CLASSES + 1):
        with pytest.raises(SystemExit, match=f"from 2 to the number of classes, {NUM_CLASSES}"):
            trainer_of(folder, *flags, str(dim))
    for dim, bank, match in (("2", "simplex", "simplex"), ("3", "ortoplex", "ortoplex")):
        with pytest.raises(hyperproto.BankError, match=match):
            trainer_of(folder, *flags, dim, "--final-bank", bank)


@pytest.fixture
def prototypes(tmp_path) -> Path:
    """A file of one's own prototypes, not of length 1."""
    path = tmp_path / "own.npy"
    np.save(path, np.random.default_rng(0).normal(size=(NUM_CLASSES, 3)))
    return path


@pytest.mark.parametrize(
    ("flag", "flags"), [("--bank", ["--head", "dl2pa", "--dim", "3"]), ("--final-bank", ["--final-dim", "3"])]
)
def test_prototypes_come_from_a_file_whose_name_the_result_tells(folder, tmp_path, prototypes, flag, flags):
    flags = [*flags, flag, str(prototypes), "--refit", "5"]
    output = tmp_path / "run"
    result = run(folder, tmp_path / "results.jsonl", *flags, "--output", str(output))
    assert result["arguments"][flag.removeprefix("--").replace("-", "_")] == "own.npy"
    trainer = trainer_of(folder, *flags)
    trainer.resume(output)
    trainer.train()
    head = next(iter(hyperproto.get_heads(trainer.model).values()))
    rows = np.load(prototypes)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(head.bank.prototypes, expected, atol=1e-6)


def test_files_that_hold_no_prototypes_are_refused(folder, tmp_path, prototypes):
    with pytest.raises(SystemExit, match=r"expected a \.npy file of C x D numbers"):
        trainer_of(folder, "--head", "dl2pa", "--dim", "3", "--bank", str(tmp_path / "missing.npy"))
    with pytest.raises(SystemExit, match=r"expected a \.npy file of C x D numbers"):
        trainer_of(folder, "--final-dim", "3", "--final-bank", str(tmp_path / "missing.npy"))
    with pytest.raises(hyperproto.HyperprotoError, match="3"):
        trainer_of(folder, "--final-dim", "2", "--final-bank", str(prototypes))
    np.save(prototypes, np.eye(NUM_CLASSES - 1))
    with pytest.raises(hyperproto.HyperprotoError, match=str(NUM_CLASSES)):
        trainer_of(folder, "--final-dim", "3", "--final-bank", str(prototypes))


def test_several_processes_keep_no_checkpoint_between_assignment_steps(folder, tmp_path, monkeypatch):
    flags = ["--head", "dl2pa", "--dim", "3", "--assign-every", "2"]
    trainer_of(folder, *flags, "--output", str(tmp_path))
    monkeypatch.setattr(train, "world_size", lambda: 2)
    trainer_of(folder, *flags)
    with pytest.raises(SystemExit, match="Choose --assign-every 1"):
        trainer_of(folder, *flags, "--output", str(tmp_path))


def test_a_model_with_auxiliary_outputs_is_told_how_to_go_without(folder, tmp_path):
    flags = ["--model", "torchvision/googlenet", "--model-kwargs", "init_weights=False", "--dim", "3"]
    flags += ["--image-size", "64", "--workers", "1", "--projection", "linear"]
    with pytest.raises(SystemExit, match=r"GoogLeNetOutputs in training.*--model-kwargs aux_logits=False"):
        run(folder, tmp_path / "results.jsonl", *flags)


@pytest.mark.parametrize(
    ("largest", "num_classes", "imbalance", "total"),
    # Sizes of CIFAR-100-LT and CIFAR-10-LT as published.
    [(500, 100, 0.01, 10_847), (500, 100, 0.02, 12_608), (5000, 10, 0.01, 12_406)],
)
def test_long_tail_profile_has_the_published_sizes(largest, num_classes, imbalance, total):
    counts = data.long_tail_counts(largest, num_classes, imbalance)
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (largest, int(largest * imbalance))


def test_long_tail_keeps_the_first_images_of_each_class(folder, tmp_path):
    result = run(folder, tmp_path / "results.jsonl", "--imbalance", "0.25", "--holdout", "0")
    # 12, 12 * 0.25 ** (1 / 3) = 7.56, 4.76 and 3 images
    assert result["training_images"] == 12 + 7 + 4 + 3
    assert result["temperature"] is result["calibration_error_fitted"] is None
    split = data.Split(torch.arange(6), np.array([1, 0, 1, 0, 1, 0]))
    kept = data.keep_long_tail(split, 1 / 3)
    assert kept.images.tolist() == [0, 1, 3, 5]
    assert kept.labels.tolist() == [1, 0, 0, 0]


def test_holdout_takes_its_share_of_each_class():
    labels = np.repeat([0, 1, 2], [50, 100, 10])[np.random.default_rng(1).permutation(160)]
    training, held_out = data.split_holdout(labels, 0.1)
    assert np.bincount(labels[held_out]).tolist() == [5, 10, 1]
    assert sorted([*training, *held_out]) == list(range(160))


def test_settings_are_chosen_on_training_images(folder, tmp_path):
    # 25 % of 12 images of each class are 3; of the other 9, one is held out for the temperature.
    result = run(folder, tmp_path / "results.jsonl", "--validation", "0.25")
    assert result["training_images"] == NUM_CLASSES * 8
    assert set(result["class_accuracy"]) <= {0.0, 33.33, 66.67, 100.0}
    other = tmp_path / "other"
    (other / "train").parent.mkdir()
    (other / "train").symlink_to(folder / "train")
    (other / "test").mkdir()
    for label in range(NUM_CLASSES):  # other test images, which must not matter
        (other / "test" / f"class{label}").mkdir()
        Image.new("RGB", (32, 32)).save(other / "test" / f"class{label}" / "0.png")
    again = run(other, tmp_path / "results.jsonl", "--validation", "0.25")
    assert again["class_accuracy"] == result["class_accuracy"]


def test_images_that_train_and_test_share_are_refused(folder):
    """timm looks for a folder "validation" or "val", and else takes all of the class folders below."""
    with pytest.raises(SystemExit, match=f"share {NUM_CLASSES * TRAIN_IMAGES} images"):
        data.read_splits("torch/image_folder", folder, decoded=True)
    train_split, test_split = data.read_splits("torch/image_folder", folder, decoded=True, test_split="test")
    assert (len(train_split.labels), len(test_split.labels)) == (NUM_CLASSES * TRAIN_IMAGES, NUM_CLASSES * TEST_IMAGES)


def test_a_cache_serves_its_own_images_alone(folder, tmp_path):
    cache = tmp_path / "cache.pt"
    first = data.read_splits("folder", folder, decoded=True, cache=cache)
    for split, kept in zip(first, data.read_splits("folder", folder, decoded=True, cache=cache), strict=True):
        assert torch.equal(split.images, kept.images)
        assert split.labels.tolist() == kept.labels.tolist()
    with pytest.raises(SystemExit, match="choose another file"):
        data.read_splits("folder", tmp_path, decoded=True, cache=cache)


def test_digits_are_not_mirrored():
    images = torch.arange(4 * 4 * 3, dtype=torch.uint8).view(1, 4, 4, 3).expand(8, -1, -1, -1)
    split, ones = data.Split(images, np.arange(8)), torch.ones(3)
    for flip, kinds in ((True, 2), (False, 1)):
        loader = data.TensorLoader(split, 8, ones, ones, torch.device("cpu"), augment_seed=0, padding=0, flip=flip)
        [(batch, _)] = loader
        assert len(batch.unique(dim=0)) == kinds


def test_crops_and_flips_are_those_of_a_padded_image():
    images = torch.randint(256, (6, 8, 10, 3), dtype=torch.uint8)
    mean, std = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2.0, 3.0, 4.0])
    split = data.Split(images, np.arange(6))
    loader = data.TensorLoader(split, 3, mean, std, torch.device("cpu"), augment_seed=0, padding=2)
    epochs = []
    for epoch in range(16):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
        epochs.append((torch.cat([batch for batch, _ in batches]), torch.cat([labels for _, labels in batches])))
    found = set()
    for batch, labels in epochs:
        assert sorted(labels.tolist()) == list(range(6))
        for image, label in zip(batch, labels.tolist(), strict=True):
            pixels = (image.permute(1, 2, 0) * std + mean).round().numpy()
            padded = np.zeros((12, 14, 3))
            padded[2:10, 2:12] = images[label].numpy()
            matches = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if np.array_equal(pixels, padded[top : top + 8, left : left + 10][:, :: -1 if flip else 1])
            ]
            assert len(matches) == 1
            found.add(matches[0])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
    assert {flip for _, _, flip in found} == {False, True}
    loader.set_epoch(3)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), epochs[3][0])
    assert not torch.equal(epochs[3][1], epochs[4][1])


def test_processes_share_an_epoch_without_overlap():
    split = data.Split(torch.zeros(11, 4, 4, 3, dtype=torch.uint8), np.arange(11))
    ones, seen = torch.ones(3), []
    for rank in range(2):
        loader = data.TensorLoader(split, 2, ones, ones, torch.device("cpu"), augment_seed=5, rank=rank, world_size=2)
        batches = [labels.tolist() for _, labels in loader]
        assert len(batches) == len(loader) == 2
        seen += [label for batch in batches for label in batch]
    assert len(set(seen)) == 8


def test_pixel_statistics_are_those_of_numpy():
    images = torch.randint(256, (5, 6, 7, 3), dtype=torch.uint8)
    mean, std = data.pixel_statistics(images)
    assert mean.numpy() == pytest.approx(images.numpy().mean(axis=(0, 1, 2)), rel=1e-6)
    assert std.numpy() == pytest.approx(images.numpy().std(axis=(0, 1, 2)), rel=1e-6)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_cifar_resnet_has_the_published_number_of_parameters(depth, parameters):
    model = cifar_resnet.CifarResNet(depth, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_learning_rate_over_the_epochs():
    common = {"lr": 0.1, "epochs": 200, "warmup_epochs": 5.0, "milestones": [160, 180]}
    step = Namespace(schedule="step", **common)
    assert [train.learning_rate(step, t) for t in (1, 2.5, 5, 159.9, 160, 180)] == pytest.approx(
        [0.02, 0.05, 0.1, 0.1, 0.01, 0.001]
    )
    cosine = Namespace(schedule="cosine", **common)
    assert [train.learning_rate(cosine, t) for t in (2.5, 5, 102.5, 200)] == pytest.approx([0.05, 0.1, 0.05, 0.0])
    cycle = Namespace(schedule="one-cycle", **(common | {"warmup_epochs": 60.0}))
    assert [train.learning_rate(cycle, t) for t in (0, 30, 60, 130, 200)] == pytest.approx([0.004, 0.052, 0.1, 0.05, 0])


def test_figures_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    labels = torch.tensor([0, 1, 1, 2])
    result = train.figures(probabilities.log(), labels, torch.tensor([101, 100, 19]), 1.0)
    assert result["top1"] == pytest.approx(75.0)
    assert result["class_accuracy"] == [100.0, 50.0, 100.0]
    assert [result[f"{group}_accuracy"] for group in ("head", "median", "tail")] == [100.0, 50.0, 100.0]
    # Confidences 0.7, 0.6 (wrong), 0.8 and 0.5, each in a bin of its own.
    assert result["calibration_error"] == pytest.approx(100 * (0.3 + 0.6 + 0.2 + 0.5) / 4, rel=1e-5)
    assert result["calibration_error_fitted"] == result["calibration_error"]


@pytest.mark.parametrize(("temperature", "hit"), [(1.0, 1), (0.5, 0), (None, 1)])
def test_adjusted_accuracy_by_hand(temperature, hit):
    # 0.8 / 9 < 0.2 / 1, but 0.8^2 / 9 > 0.2^2 / 1.
    logits = torch.tensor([[0.8, 0.2]]).log()
    for label in (0, 1):
        result = train.figures(logits, torch.tensor([label]), torch.tensor([9, 1]), temperature)
        assert result["top1"] == 100.0 * (label == 0)
        assert result["top1_adjusted"] == 100.0 * (label == hit)
    assert train.figures(logits, torch.tensor([0]), torch.tensor([5, 5]), temperature)["top1_adjusted"] is None


def test_temperature_undoes_a_scale():
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    logits = 5.0 * probabilities.log().expand(10, 3)
    assert train.fit_temperature(logits, labels) == pytest.approx(5.0, rel=1e-3)


def test_flags_override_the_preset_and_its_head_options_stay_with_its_head():
    published = train.parse_arguments(["DATA", "--preset", "cifar100-lt"])
    assert (published.width, published.milestones, published.loss) == (32, [160, 180], "long-tail")
    other = train.parse_arguments(["DATA", "--preset", "cifar100-lt", "--head", "softmax", "--lr", "0.2"])
    assert (other.lr, other.loss, other.start, other.dim, other.weight_decay) == (
        0.2,
        "cross-entropy",
        "none",
        128,
        2e-4,
    )
    balanced = train.parse_arguments(["DATA", "--preset", "cifar100-balanced", "--head", "softmax"])
    assert (balanced.lr, balanced.reduction) == (0.01, "mean")
    etf = train.parse_arguments(["DATA", "--preset", "cifar100-lt", "--head", "etf"])
    assert (etf.bank, etf.assignment, etf.loss) == ("simplex", "static", "long-tail")


def test_the_defaults_are_the_recipe_of_the_results_and_give_softmax_the_same_budget():
    flags = ["--model", "cifar_resnet20", "--epochs", "10", "--dim", "100", "--seed", "0", "--device", "cpu"]
    flags += ["--precision", "bf16"]  # of the runs, on any device
    page = (ROOT / "experiments/results/balanced.jsonl").read_text().splitlines()
    for more in ([], ["--final-dim", "50"]):
        recipe = train.described(train.parse_arguments(["DATA", *flags, *more]))
        given = {key: value for key, value in recipe.items() if value is not None}
        assert any(json.loads(line)["arguments"].items() >= given.items() for line in page)
    softmax = train.parse_arguments(["DATA", "--head", "softmax", *flags])
    assert (softmax.lr, softmax.refit, softmax.bank, softmax.final_bank) == (0.2, None, "random", None)


def test_defaults_follow_from_what_is_given():
    def refit(*flags: str) -> int | None:
        return train.parse_arguments(["DATA", *flags]).refit

    assert refit() == refit("--head", "dl2pa", "--dim", "3") == 200
    assert refit("--refit", "7") == 7
    pulled, smoothed = ("--head", "dl2pa", "--loss", "balanced"), ("--label-smoothing", "0.1")
    assert refit("--refit", "0") is refit(*pulled) is refit(*smoothed) is refit("--projection", "none") is None
    assert train.parse_arguments(["DATA", "--optimizer", "adamw"]).lr == 1e-3


def test_precision_is_what_the_device_computes_fast_unless_it_is_given():
    assert train.parse_arguments(["DATA", "--device", "cpu"]).precision == "fp32"
    assert train.parse_arguments(["DATA", "--device", "cpu", "--precision", "bf16"]).precision == "bf16"


@pytest.mark.parametrize(
    "flags",
    [
        ["--head", "softmax", "--loss", "balanced"],
        ["--head", "softmax", "--start", "data"],
        ["--head", "etf", "--bank", "random"],
        ["--label-smoothing", "0.1", "--loss", "balanced"],
        ["--refit", "-1", "--dim", "3"],
        ["--dataset", "CIFAR100"],
        ["--test-split", "test", "--dataset", "svhn"],
        ["--target-key", "fine_label", "--dataset", "torch/mnist"],
        ["--validation", "0"],
        ["--refit", "9", "--dim", "3", "--projection", "none"],
        ["--refit", "9", "--head", "softmax"],
        ["--final-dim", "2", "--dim", "3", "--refit", "0"],
        ["--dim", "3", "--refit", "9", "--loss", "balanced"],
        ["--dim", "3", "--refit", "9", "--label-smoothing", "0.1"],
        ["--head", "softmax", "--dim", "3", "--refit", "9", "--final-dim", "2", "--final-bank", "class-vectors"],
        ["--final-dim", "2", "--dim", "3", "--refit", "9", "--projection", "linear"],
        ["--final-bank", "hpn", "--dim", "3", "--refit", "9"],
        ["--mixup", "1", "--batch-size", "7"],
        ["--imbalance", "0"],
        ["--holdout", "1"],
        ["--resume"],
    ],
    ids=" ".join,
)
def test_flags_that_contradict_each_other_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["DATA", *flags])
    assert flags[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_resnet", "torchvision/shufflenet_v2_x0_5", "cifar_resnet8"])
def test_larger_images_go_through_timm(folder, tmp_path, model):
    flags = ["--model", model, "--image-size", "64", "--workers", "1", "--dim", "3", "--start", "data", "--ema", "0.9"]
    result = run(folder, tmp_path / "results.jsonl", *flags)
    assert result["training_images"] == NUM_CLASSES * (TRAIN_IMAGES - 1)


def run_in_two_processes(folder: Path, results: Path, *flags: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    command += [
        str(ROOT / "examples/train.py"),
        str(folder),
        *TINY,
        "--threads",
        "1",
        "--results",
        str(results),
        *flags,
    ]
    subprocess.run(command, check=True, capture_output=True)
    [line] = results.read_text().splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_two_processes_train_one_model(folder, tmp_path):
    flags = ["--dim", "3", "--start", "data", "--refit", "5", "--epochs", "2", "--batch-size", "4"]
    assert run_in_two_processes(folder, tmp_path / "results.jsonl", *flags)["processes"] == 2


def to_logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """(C, F) weights from features to logits; those of the layers are unique up to the signs of the components."""
    norm = {name: state[f"fc.projection.1.{name}"] for name in ("weight", "running_var")}
    gain = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
    return state["fc.vectors.weight"] @ (gain[:, None] * state["fc.projection.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "softmax, then softmax"])
def test_two_processes_fit_softmax_as_one_does(folder, trained, tmp_path, name):
    flags = [*FINAL[name], "--dim", str(NUM_CLASSES), "--refit", "5", "--epochs", "4"]
    flags += ["--epochs-from", str(trained["softmax"])]
    one = run(folder, tmp_path / "one.jsonl", *flags, "--output", str(tmp_path / "one"))
    two = run_in_two_processes(folder, tmp_path / "two.jsonl", *flags, "--output", str(tmp_path / "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    before = to_logits(torch.load(trained["softmax"])["model"])
    expected, found = (to_logits(torch.load(tmp_path / count / "model.pt")) for count in ("one", "two"))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3 * float(expected.abs().max()))
    assert (found - before).abs().max() > 0.05 * expected.abs().max()
