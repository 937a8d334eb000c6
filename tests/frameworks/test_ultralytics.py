"""ultralytics: its classification models, and the trainer that builds its own."""

from types import SimpleNamespace

import pytest
import torch
from inside import NUM_CLASSES, block

from hyperproto import convert_model, get_heads

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics (AGPL) is to be installed by hand")


def test_its_trainer_leaves_a_head_of_the_right_width():
    model = tasks.ClassificationModel("yolo11n-cls.yaml", nc=NUM_CLASSES, verbose=False)
    name = f"model.{len(model.model) - 1}.linear"
    convert_model(model, dim=4, classifier=name)
    tasks.ClassificationModel.reshape_outputs(model, NUM_CLASSES)
    assert list(get_heads(model)) == [name]
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, NUM_CLASSES)


def test_the_page():
    space: dict = {}
    exec(block("ultralytics"), space)
    trainer = space["Trainer"].__new__(space["Trainer"])  # as its data set is read: with a number of classes
    trainer.data = {"nc": NUM_CLASSES, "channels": 3}
    trainer.resume = False
    trainer.args = SimpleNamespace(pretrained=False, dropout=0.0)
    assert len(get_heads(trainer.get_model("yolo11n-cls.yaml", verbose=False))) == 1
