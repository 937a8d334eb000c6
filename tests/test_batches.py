"""What people pass for a loader: taken where it can mean one thing only, refused in words elsewhere."""

import collections
import copy
from itertools import product

import numpy as np
import pytest
import torch
from clouds import assert_same_state, clouds, make_head
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hyperproto import (
    HyperprotoError,
    HypersphericalHead,
    compress_head,
    convert_model,
    fit_head,
    fit_logit_scale,
    refit_head,
)
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.fitting.batches import BATCH_SIZE, read_batches

FITS = {
    "fit_head": fit_head,
    "refit_head": lambda model, loader: refit_head(model, loader, iterations=3),
    "compress_head": lambda model, loader: compress_head(model, loader, dim=2, iterations=3),
    "fit_logit_scale": fit_logit_scale,
}

FEATURES, LABELS = clouds(5, 16, apart=0.3)


class Samples(Dataset):
    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"pixel_values": FEATURES[index], "label": int(LABELS[index])}


class Stream(IterableDataset):
    def __iter__(self):
        return zip(FEATURES.split(50), LABELS.split(50), strict=True)


Pair = collections.namedtuple("Pair", ["inputs", "labels"])

TAKEN = {
    "labels as a list": [(FEATURES, LABELS.tolist())],
    "labels as a tuple": [(FEATURES, tuple(LABELS.tolist()))],
    "labels as an array": [(FEATURES, LABELS.numpy())],
    "labels as a short array": [(FEATURES, LABELS.numpy().astype(np.uint8))],
    "arrays": [(FEATURES.double().numpy(), LABELS.numpy())],
    "more than two": [(FEATURES, LABELS, "more")],
    "a list of two": [[FEATURES, LABELS]],
    "named": [Pair(FEATURES, LABELS)],
    "image and label": [{"image": FEATURES, "label": LABELS}],
    "pixel_values, mask and labels": [{"pixel_values": FEATURES, "mask": LABELS > 2, "labels": LABELS}],
    "one name known": [collections.UserDict({"spectrum": FEATURES, "y": LABELS.tolist()})],
    "a pair of tensors": (FEATURES, LABELS),
    "a pair of arrays": (FEATURES.double().numpy(), LABELS.numpy()),
    "a pair in a list": [FEATURES, LABELS],
    "an array and a list": (FEATURES.numpy(), LABELS.tolist()),
    "a data set": TensorDataset(FEATURES, LABELS),
    "a data set of dictionaries": Samples(),
    "a data set of batches": Stream(),
    "a loader": DataLoader(Samples(), batch_size=40),
    "labels of positions": [(FEATURES[:, None], LABELS[:, None])],
}

REFUSED = {
    "None": None,
    "a name": "train",
    "a number": 3,
    "a dictionary of loaders": {"train": [(FEATURES, LABELS)]},
    "inputs alone": FEATURES,
    "inputs in a tuple": [(FEATURES,)],
    "inputs in a list": [FEATURES, FEATURES, FEATURES],
    "None in the place of a batch": [None],
    "strings": ["ab", "cd"],
    "labels that are None": [(FEATURES, None)],
    "names of classes": [(FEATURES, ["cat"] * len(LABELS))],
    "ragged labels": [(FEATURES, [[0], [1, 2]])],
    "labels that are a dictionary": [(FEATURES, {"class": LABELS})],
    "halves": [(FEATURES, (LABELS + 0.5).tolist())],
    "complex labels": [(FEATURES, LABELS + 0j)],
    "boolean labels": [(FEATURES, LABELS > 2)],
    "samples": zip(FEATURES, LABELS, strict=True),
    "samples with plain labels": zip(FEATURES, LABELS.tolist(), strict=True),
    "dictionaries without labels": [{"image": FEATURES}],
    "dictionaries with two labels": [{"image": FEATURES, "label": LABELS, "target": LABELS}],
    "dictionaries with two inputs": [{"left": FEATURES, "right": FEATURES, "label": LABELS}],
    "strings as inputs": [(["a text"] * len(LABELS), LABELS)],
    "no input": [(None, LABELS)],
    "objects": [(np.array([None] * len(LABELS)), LABELS)],
    "a pair of unequal lengths": (FEATURES, LABELS[:7]),
    "labels of too many positions": [(FEATURES, LABELS[:, None].repeat(1, 3))],
    "one-hot integers": [(FEATURES, nn.functional.one_hot(LABELS, 5))],
}


def make_model() -> nn.Sequential:
    return nn.Sequential(make_head(5, 16, 4))


@pytest.mark.parametrize(
    ("fit", "kind"),
    in_front(product(FITS, TAKEN), *(("fit_head", kind) for kind in TAKEN), *((fit, "a loader") for fit in FITS)),
)
def test_what_can_mean_one_thing_only_is_taken(fit, kind):
    plain, other = make_model(), make_model()
    expected = FITS[fit](plain, [(FEATURES, LABELS)])
    found = FITS[fit](other, TAKEN[kind])
    if fit == "fit_logit_scale":
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        assert (found.num_samples, found.accuracy) == (len(LABELS), pytest.approx(expected.accuracy, abs=0.01))


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("fit", FITS)
def test_anything_else_is_refused_in_words_and_leaves_the_model_as_it_was(fit, kind):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HyperprotoError, match=r"label|loader|batch|input|target"):
        FITS[fit](model, REFUSED[kind])
    assert_same_state(model, before)


@given(num=st.integers(1, 3 * BATCH_SIZE), as_array=st.booleans())
def test_whole_arrays_come_in_batches_that_hold_all_rows_in_their_order(num, as_array):
    rows, labels = torch.arange(float(num))[:, None], torch.arange(num)
    pair = (rows.numpy(), labels.numpy()) if as_array else (rows, labels)
    parts = list(read_batches(pair))
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), rows)
    assert torch.equal(torch.cat([own for _, own in parts]), labels)
    assert all(len(inputs) == len(own) <= BATCH_SIZE for inputs, own in parts)


class TwoInputs(nn.Module):
    """A model of two inputs, in a tuple, a list or a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(16, 8), nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, inputs: object) -> torch.Tensor:
        first, second = inputs.values() if isinstance(inputs, dict) else inputs
        return self.fc(self.first(first) + self.second(second))


@pytest.mark.parametrize(
    "make", [lambda *both: both, lambda *both: list(both), lambda *both: dict(zip("ab", both, strict=True))]
)
@pytest.mark.parametrize("fit", FITS)
def test_several_inputs_are_passed_on(fit, make):
    model = convert_model(TwoInputs(), classifier="fc", dim=4)
    inputs = make(FEATURES, torch.randn(len(LABELS), 3))
    fit_head(model, [(inputs, LABELS)])
    found = FITS[fit](model, [(inputs, LABELS)])
    assert fit == "fit_logit_scale" or found.num_samples == len(LABELS)


@pytest.mark.parametrize("fit", FITS)
def test_labels_of_positions_are_samples(fit):
    maps = nn.Sequential(ChannelsFirstHead(16, 5, dim=4, bank="random"))
    rows = make_model()
    features, labels = FEATURES[:144].view(4, 6, 6, 16), LABELS[:144].view(4, 6, 6)
    expected = FITS[fit](rows, [(FEATURES[:144], LABELS[:144])])
    found = FITS[fit](maps, [(features.permute(0, 3, 1, 2), labels)])
    tokens = make_model()
    again = FITS[fit](tokens, [(features.flatten(1, 2), labels.flatten(1, 2))])
    assert found == again
    if fit == "fit_logit_scale":
        assert found == pytest.approx(expected)
    else:
        assert (found.num_samples, found.accuracy) == (144, expected.accuracy)
    with pytest.raises(HyperprotoError, match="positions"):
        FITS[fit](nn.Sequential(ChannelsFirstHead(16, 5, dim=4)), [(features.permute(0, 3, 1, 2), labels[:, :3])])


@pytest.mark.parametrize("fit", [fit_head, fit_logit_scale])
def test_inputs_go_where_the_model_begins(fit):
    seen = []

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 8), HypersphericalHead(8, 5, dim=4).to("meta")

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs.device.type)
            return self.head(self.body(inputs).to("meta"))

    with pytest.raises((NotImplementedError, RuntimeError)):  # meta tensors have no values to fit to
        fit(Split(), [(FEATURES, LABELS)])
    assert seen == ["cpu"]
