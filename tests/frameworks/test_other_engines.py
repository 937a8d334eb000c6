"""The shorter blocks of docs/inside.md: closures, PEFT, ignite, ema-pytorch, pytorch-metric-learning, Composer."""

import copy

import pytest
import torch
from inside import NUM_CLASSES, batches, block, network, samples

from hyperproto import get_heads


def run(heading: str, **names: object) -> dict:
    space = {"model": network(), "torch": torch, **names}
    exec(block(heading), space)
    return space


def needs_framework(name: str) -> None:
    pytest.importorskip(name, reason=f'{name} is one of the extra "frameworks"')


def test_closures_count_a_batch_once():
    images, labels = samples()
    assigner = run("One sample, one count", images=images, labels=labels)["assigner"]
    assert assigner.class_counts.tolist() == [8.0] * NUM_CLASSES


@pytest.mark.filterwarnings("ignore")  # of torchao and other packages that it looks for
def test_peft():
    needs_framework("peft")
    space = run("PEFT")
    images, labels = samples()
    space["criterion"](space["model"](images), labels).backward()
    space["assigner"].step()
    [used] = [head for name, head in get_heads(space["model"]).items() if "modules_to_save" in name]
    assert torch.equal(used.assignment, space["assigner"].head.assignment)
    assert not torch.equal(used.assignment, torch.arange(NUM_CLASSES))


def test_ignite():
    needs_framework("ignite")
    assigner = run("pytorch-ignite", loader=batches())["assigner"]
    assert len(assigner.history) == 2
    assert assigner.class_counts.tolist() == [16.0] * NUM_CLASSES


def test_ema_pytorch():
    needs_framework("ema_pytorch")
    space = run("ema-pytorch")
    order = torch.arange(NUM_CLASSES - 1, -1, -1)
    space["model"].fc.assign_(order)
    lines = block("ema-pytorch").splitlines()[-2:]
    for _ in range(20):
        exec("\n".join(lines), space)
    averaged = copy.deepcopy(space["average"].ema_model).eval()
    images, _ = samples()
    assert torch.equal(averaged(images).argmax(dim=1), space["model"].eval()(images).argmax(dim=1))
    assert torch.equal(averaged.fc.assignment, order)


def test_metric_learning():
    needs_framework("pytorch_metric_learning")
    images, labels = samples()
    space = run("pytorch-metric-learning", images=images, labels=labels)
    space["loss"].backward()
    assert space["assigner"].class_counts.tolist() == [8.0] * NUM_CLASSES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_composer():
    pytest.importorskip("composer", reason="Composer is to be installed by hand: it asks for a torch of its own")
    space = run("Composer", loader=batches(), options={"progress_bar": False, "device": "cpu"})
    assert len(space["assigner"].history) == 2
    assert space["assigner"].class_counts.tolist() == [16.0] * NUM_CLASSES
