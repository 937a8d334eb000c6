"""experiments/gpu.py without a GPU: it trains what train.py trains, in the order of worth and within the time."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import cifar100  # noqa: E402
import gpu  # noqa: E402
import mosaics  # noqa: E402
import train  # noqa: E402
from cuda_graph import WARM_UP, captured  # noqa: E402

# Tiny data: the scale has no best value, or a bound is the best.
pytestmark = pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning")


CPU = torch.device("cpu")


@pytest.mark.parametrize("queue", gpu.QUEUES)
def test_runs_of_a_queue_can_be_made_and_differ(queue):
    runs = [run for group in gpu.missing_runs(queue, [], "--device cuda --precision bf16") for run in group]
    assert [method for method, _ in runs] == [method for method, _ in gpu.QUEUES[queue]()]
    described = [train.described(args) for _, args in runs]
    assert all(described.count(each) == 1 for each in described)
    done = [cifar100.arguments_of(shlex.split(flags)) for _, flags in gpu.QUEUES[queue]()]
    assert gpu.missing_runs(queue, done, "") == []
    [missing] = gpu.missing_runs(queue, done[1:], "")
    assert missing[0][0] == runs[0][0]


def test_the_published_cell_is_trained_three_times_and_ends_in_six_ways():
    groups = gpu.missing_runs("published", [], "")
    assert [len(group) for group in groups] == [1, 1, 4]


@pytest.mark.parametrize("queues", [[*gpu.QUEUES][:1], pytest.param([*gpu.QUEUES], marks=pytest.mark.slow)])
def test_dry_run(capsys, queues):
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    gpu.main([*queues, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.rsplit(": ", 1)[0] for line in lines]
    wanted = {f"{queue}: {method}" for queue in queues for method, _ in gpu.QUEUES[queue]()}
    assert set(shown) == wanted
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize(
    "flags",
    [
        "--head dl2pa --dim 8 --loss balanced --start random --schedule step --milestones 1 --lr 0.02",
        "--head softmax --dim 8 --schedule cosine --optimizer adamw --lr 1e-3",
        # Small steps and one iteration, in which rounding grows less.
        "--head dl2pa --dim 8 --loss cross-entropy --start data --refit 1 --lr 0.01",
    ],
)
def test_trains_as_train_py_does(flags):
    common = "--model cifar_resnet8 --width 4 --epochs 2 --batch-size 16 --device cpu --precision fp32 --holdout 0.25"
    args = train.parse_arguments(["DATA", *shlex.split(f"{common} {flags}")])
    splits = gpu.toy_images()
    training = gpu.Training([("it", args)], splits, gpu.build_loaders(args, splits, CPU), CPU)
    images = training.num_images
    training.begin()
    for _ in range(2):
        training.begin_epoch()
        training.end_epoch()
    assert (images, training.num_images) == (2 * 64, 0)  # 96 less the held-out ones, in whole batches
    expected = training.build_trainer(args)
    expected.loaders = gpu.build_loaders(args, splits, CPU)
    expected.train()
    [line] = training.results()
    figures = train.summarise(expected, training.class_counts)
    for (key, value), other in zip(
        training.trainer.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-3, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
    for ours, theirs in zip(training.trainer.history, expected.history, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["moved"] == theirs["moved"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert line["top1"] == pytest.approx(figures["top1"])
    assert line.keys() == figures.keys() | {"method", "card", "enlarged_to"}


def test_mixed_images_and_labels_have_the_same_shares():
    args = train.parse_arguments(["DATA", *shlex.split(gpu.toy("published")), "--head", "softmax", "--mixup", "1.0"])
    splits = gpu.toy_images()
    training = gpu.Training([("it", args)], splits, gpu.build_loaders(args, splits, CPU), CPU)
    training.begin()
    training.begin_epoch()
    shares = training.shares
    assert ((shares > 0) & (shares < 1)).all()
    assert len(shares.unique()) == training.steps
    seen = {}
    training.trainer.model.register_forward_pre_hook(lambda model, inputs: seen.update(images=inputs[0]))
    training.trainer.criterion.register_forward_pre_hook(lambda loss, inputs: seen.update(target=inputs[1]))
    training.position.fill_(2)
    training.step()
    batch = training.loaders.train.augmented(training.draws[:, 32:48])
    share, images = shares[2], batch[0]
    torch.testing.assert_close(seen["images"], share * images + (1 - share) * images.flip(0))
    one_hot = torch.eye(12)[batch[1]]
    torch.testing.assert_close(seen["target"], share * one_hot + (1 - share) * one_hot.flip(0))


def test_every_step_is_called_as_often_without_a_graph():
    calls = []
    replay = captured(lambda: calls.append(1), None)
    assert len(calls) == WARM_UP
    replay()
    assert len(calls) == WARM_UP + 1


class FakeTraining:
    """Takes a second for 10 images, however many others there are."""

    def __init__(self, name: str, epochs: int, clock: list[float], diverges: bool = False) -> None:
        self.name, self.epochs, self.clock, self.diverges = name, epochs, clock, diverges
        self.num_images, self.done = 100 * epochs, 0

    def begin(self) -> None:
        assert self.num_images == 100 * self.epochs

    def begin_epoch(self) -> None:
        self.clock[0] += 10.0

    def end_epoch(self) -> float | None:
        if self.diverges:
            raise FloatingPointError("the loss is nan")
        self.num_images -= 100
        self.done += 1
        return 10.0 if self.done > 1 else None

    def results(self):
        yield {"method": self.name}


def names_written(queue: list[FakeTraining], clock: list[float], seconds: float, side_by_side: int = 2) -> list[str]:
    written: list[str] = []
    gpu.work(
        list(queue),
        lambda line: written.append(line["method"]),
        side_by_side=side_by_side,
        seconds_left=lambda: seconds - clock[0],
    )
    return written


def test_what_does_not_fit_is_left_out_by_the_speed_seen(capsys):
    clock = [0.0]
    queue = [FakeTraining(name, epochs, clock) for name, epochs in (("a", 4), ("b", 2), ("long", 40), ("c", 1))]
    assert names_written(queue, clock, 75.0) == ["b", "c", "a"]
    assert capsys.readouterr().out == "left out: long\n"


def test_the_least_worth_makes_room_for_the_others(capsys):
    clock = [0.0]
    queue = [FakeTraining("first", 4, clock), FakeTraining("second", 9, clock)]
    assert names_written(queue, clock, 90.0) == ["first"]
    assert "its end: second" in capsys.readouterr().out


def test_a_run_that_diverges_takes_no_other_with_it(capsys):
    clock = [0.0]
    queue = [FakeTraining("a", 2, clock, diverges=True), FakeTraining("b", 2, clock)]
    assert names_written(queue, clock, 1000.0, side_by_side=1) == ["b"]
    assert "given up: a: the loss is nan" in capsys.readouterr().out


def test_without_a_limit_all_are_made():
    clock = [0.0]
    queue = [FakeTraining(str(number), 3, clock) for number in range(5)]
    assert names_written(queue, clock, float("inf"), side_by_side=3) == ["0", "1", "2", "3", "4"]


def test_images_are_read_from_all_folders_in_order(tmp_path):
    generator = np.random.default_rng(0)
    folders = [tmp_path / "first", tmp_path / "second"]
    images = {}
    for folder, names in zip(
        folders, (("train_a_00", "test_00", "test_01"), ("train_b_00", "train_a_01")), strict=True
    ):
        folder.mkdir()
        for name in names:
            images[name] = generator.integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
            sheet = np.concatenate(
                [np.concatenate(list(row), axis=1) for row in images[name].reshape(2, 20, 32, 32, 3)]
            )
            Image.fromarray(sheet).save(folder / f"{name}.webp", lossless=True)
    training, test = mosaics.read_mosaics(folders)
    order = ("train_a_00", "train_a_01", "train_b_00")
    np.testing.assert_array_equal(training.images.numpy(), np.concatenate([images[name] for name in order]))
    assert training.labels.tolist() == [0] * 40 + [1] * 40 + [0] * 40
    assert test.labels.tolist() == [0] * 40 + [1] * 40
    chosen = mosaics.first_images(training, np.array([50, 3]))
    expected = [images["train_a_00"], images["train_b_00"][:10], images["train_a_01"][:3]]
    np.testing.assert_array_equal(chosen.images.numpy(), np.concatenate(expected))
    with pytest.raises(SystemExit, match=r"1 classes have fewer .* class 1 has 40 of 41"):
        mosaics.first_images(training, np.array([80, 41]))
    with pytest.raises(SystemExit, match="no file train_"):
        mosaics.read_mosaics([tmp_path])


def test_weights_by_other_names_reach_the_layers_in_order(tmp_path):
    [[(_, args)], *_] = gpu.missing_runs("finetune", [], "--device cpu --precision fp32")
    args.num_classes = 12
    plain = gpu.build_model(args, None)
    saved = gpu.timm.create_model(args.model).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({f"other_{number}": value for number, value in enumerate(saved.values())}, path)
    model = gpu.build_model(args, path)
    for key, value in model.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(value, saved[key])
    widths = []
    model.conv_stem.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape))
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == plain.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 12)
    assert widths == [(1, 3, gpu.ENLARGED, gpu.ENLARGED)]


def test_lines_are_added_and_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu.QUEUES, "published", lambda: iter([("softmax", "--preset cifar100-lt --head softmax")]))
    arguments = gpu.argparse.Namespace(dry_run=True, results=tmp_path, side_by_side=1, weights=None)
    gpu.run_queue("published", arguments, lambda: float("inf"))
    [line] = [json.loads(text) for text in (tmp_path / "published.jsonl").read_text().splitlines()]
    assert (line["method"], line["device"], line["card"]) == ("softmax", "cpu", None)
    done = cifar100.deciding(line["arguments"])
    assert done == cifar100.arguments_of(shlex.split(f"--preset cifar100-lt --head softmax {gpu.toy('published')}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["published"], "--data is needed"),
        (["finetune", "--data", "."], "finetune needs --weights"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err
