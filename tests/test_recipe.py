"""examples/recipe.py on tiny images: what it trains, fits and measures."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compatible import in_front
from PIL import Image

import hyperproto

# Tiny data: the scale has no best value, or a bound is the best.
pytestmark = pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning")


EXAMPLE = Path(__file__).parents[1] / "examples/recipe.py"
COLOURS = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Class folders of 32 x 32 images: noise around a colour of the class."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for label, colour in enumerate(COLOURS):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                noisy = np.clip(colour + generator.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / split / f"class{label}" / f"{index:02d}.png")
    return root


@pytest.fixture
def recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("recipe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"MODEL": "test_resnet", "IMAGE_SIZE": 32, "BATCH_SIZE": 8, "LEARNING_RATE": 0.02, "WORKERS": 0}
    for name, value in {**small, "HOLDOUT": 0.1, "DEVICE": torch.device("cpu")}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize(("flags", "dim"), in_front([((), 2), (("--dim", "3"), 3)], ((), 2)))
def test_the_recipe_learns_and_ends_in_few_dimensions(recipe, folder, monkeypatch, capsys, flags, dim):
    evaluate, models = recipe.evaluate, []
    monkeypatch.setattr(recipe, "evaluate", lambda model, *rest: models.append(model) or evaluate(model, *rest))
    recipe.main([str(folder), *flags, "--epochs", "10"])
    [model] = models
    [head] = hyperproto.get_heads(model).values()
    assert head.dim == dim
    assert float(head.logit_scale) != 16.0  # what compress_head leaves; fitted to held-out images since

    words = re.fullmatch(r"test accuracy (.+) %, calibration error (.+) %\n", capsys.readouterr().out)
    *_, test, num_classes = recipe.load_data(folder)
    assert float(words[1]) >= 90.0
    assert list(map(float, words.groups())) == pytest.approx(evaluate(model, test, num_classes), abs=0.051)


def test_accuracy_and_calibration_error_are_those_of_the_whole_set(recipe):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 4, generator=generator), torch.randint(4, (40,), generator=generator)
    batches = list(zip(logits.split(16), labels.split(16), strict=True))
    accuracy, error = recipe.evaluate(torch.nn.Identity(), batches, 4)

    rows = np.exp(logits.double().numpy())
    confidence, right = rows.max(axis=1) / rows.sum(axis=1), rows.argmax(axis=1) == labels.numpy()
    bins = np.ceil(15 * confidence)
    gaps = [abs((confidence - right)[bins == number].sum()) for number in np.unique(bins)]
    assert accuracy == pytest.approx(100 * right.mean())
    assert error == pytest.approx(100 * sum(gaps) / len(labels))


def test_no_image_both_trains_and_sets_the_temperature(recipe, folder):
    training, plain, held_out, test, num_classes = recipe.load_data(folder)
    indices = [set(loader.dataset.indices) for loader in (training, plain, held_out)]
    assert indices[0] == indices[1]
    assert indices[1].isdisjoint(indices[2])
    assert len(indices[1] | indices[2]) == 20 * len(COLOURS)
    assert len(indices[2]) == 8
    assert (len(test.dataset), num_classes) == (10 * len(COLOURS), len(COLOURS))
