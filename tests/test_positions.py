"""Labels per pixel or token: each position of a map, or of a sequence, is a sample."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compatible import in_front
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import LOSSES as ALL
from torch import nn

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LabelError,
    PrototypeCrossEntropyLoss,
    ShapeError,
    convert_model,
)
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.testing import SEEDS

NUM_CLASSES, IGNORED = 6, 255

LOSSES = ALL | {
    "cross-entropy, weighed": lambda source, **options: PrototypeCrossEntropyLoss(
        source, weight=[1.0, 2.0, 0.5, 0.0, 3.0, 1.0], label_smoothing=0.1, **options
    ),
}
every_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES)
LAYOUTS, OUTPUTS = ("maps", "tokens", "tokens in rows and columns"), ("logits", "embedding")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_output = pytest.mark.parametrize("training_output", OUTPUTS)


def make_head(layout: str, training_output: str = "logits", dim: int = 4) -> HypersphericalHead:
    kind = ChannelsFirstHead if layout == "maps" else HypersphericalHead
    return kind(8, NUM_CLASSES, dim=dim, projection="linear", training_output=training_output)


def positions(layout: str, batch: int = 2) -> tuple[int, ...]:
    return (batch, 3) if layout == "tokens" else (batch, 3, 5)


def rows(values: torch.Tensor, layout: str) -> torch.Tensor:
    """(B, K, H, W) or (B, ..., K) -> (N, K), index by index."""
    values = values.permute(0, 2, 3, 1) if layout == "maps" else values
    return values.reshape(-1, values.shape[-1])


def features(layout: str, generator: torch.Generator, batch: int = 2) -> torch.Tensor:
    shape = positions(layout, batch)
    return torch.randn((shape[0], 8, *shape[1:]) if layout == "maps" else (*shape, 8), generator=generator)


def make_target(layout: str, generator: torch.Generator, kind: str, batch: int = 2) -> torch.Tensor:
    shape = positions(layout, batch)
    labels = torch.randint(NUM_CLASSES, shape, generator=generator)
    if kind == "ignoring":
        return labels.masked_fill(torch.rand(shape, generator=generator) < 0.4, IGNORED)
    if kind == "labels":
        return labels
    shares = torch.rand(*shape, NUM_CLASSES, generator=generator).softmax(dim=-1)
    return shares.movedim(-1, 1) if layout == "maps" else shares


@pytest.mark.parametrize(
    ("loss", "layout", "training_output"),
    in_front(
        product(LOSSES, LAYOUTS, OUTPUTS),
        *product(["balanced"], LAYOUTS, OUTPUTS),
        *((loss, "maps", "logits") for loss in LOSSES),
        ("cross-entropy, weighed", "tokens", "embedding"),
    ),
)
@settings(max_examples=25)
@given(seed=SEEDS, kind=st.sampled_from(["labels", "ignoring", "soft"]), batch=st.integers(0, 3),
       reduction=st.sampled_from(["mean", "sum", "none"]))  # fmt: skip
def test_positions_are_samples(loss, layout, training_output, seed, kind, batch, reduction):
    generator = torch.Generator().manual_seed(seed)
    head, inputs = make_head(layout, training_output), features(layout, generator, batch)
    target = make_target(layout, generator, kind, batch)
    flat = rows(target, layout) if kind == "soft" else target.flatten()
    found, expected = (LOSSES[loss](DynamicAssigner(head), reduction=reduction, ignore_index=IGNORED) for _ in range(2))
    output = head(inputs)
    value, value_of_rows = found(output, target), expected(rows(output, layout), flat)
    assert value.shape == (positions(layout, batch) if reduction == "none" else ())
    torch.testing.assert_close(value.flatten(), value_of_rows.flatten())
    gradients = [torch.autograd.grad(each.sum(), output, retain_graph=True)[0] for each in (value, value_of_rows)]
    torch.testing.assert_close(*gradients)
    for name, value in expected.assigner.state_dict().items():
        torch.testing.assert_close(found.assigner.state_dict()[name], value)
    assert found.assigner.class_counts.sum() > 0 or kind != "labels" or batch == 0


@every_layout
@given(seed=SEEDS, reduction=st.sampled_from(["mean", "sum", "none"]), soft=st.booleans())
def test_cross_entropy_is_that_of_torch(layout, seed, reduction, soft):
    generator = torch.Generator().manual_seed(seed)
    head = make_head(layout)
    logits = head(features(layout, generator))
    target = make_target(layout, generator, "soft" if soft else "ignoring")
    criterion = PrototypeCrossEntropyLoss(head, scale=float(head.logit_scale), reduction=reduction,
                                          ignore_index=IGNORED)  # fmt: skip
    channels_second = logits if layout == "maps" else logits.movedim(-1, 1)
    if soft:
        of_torch = target if layout == "maps" else target.movedim(-1, 1)
        expected = F.cross_entropy(channels_second, of_torch, reduction=reduction)
    else:
        expected = F.cross_entropy(channels_second, target, reduction=reduction, ignore_index=IGNORED).nan_to_num()
    torch.testing.assert_close(criterion(logits, target), expected, atol=1e-5, rtol=1e-4)


@every_output
@every_layout
@given(seed=SEEDS, kind=st.sampled_from(["ignoring", "soft"]), momentum=st.sampled_from([None, 0.9]))
def test_update_takes_what_the_losses_take(layout, training_output, seed, kind, momentum):
    generator = torch.Generator().manual_seed(seed)
    head = make_head(layout, training_output)
    output, target = head(features(layout, generator)), make_target(layout, generator, kind)
    found, expected = (DynamicAssigner(head, momentum=momentum) for _ in range(2))
    found.update(output, target, ignore_index=IGNORED)
    flat = rows(target, layout) if kind == "soft" else target.flatten()
    expected.update(rows(output, layout), flat, ignore_index=IGNORED)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)


@every_layout
def test_what_is_read_of_an_output_has_a_row_for_each_position(layout):
    head = make_head(layout)
    output = head(features(layout, torch.Generator().manual_seed(0)))
    flat = rows(output, layout)
    labels = make_target(layout, torch.Generator().manual_seed(1), "labels")
    assert torch.equal(head.cosines_from_output(output), head.cosines_from_output(flat))
    assert torch.equal(head.embeddings_from_output(output), head.embeddings_from_output(flat))
    assert torch.equal(head.target_cosines_from_output(output, labels),
                       head.target_cosines_from_output(flat, labels.flatten()))  # fmt: skip


@pytest.mark.parametrize("write", [torch.Tensor.tolist, torch.Tensor.numpy, lambda labels: labels.numpy().astype("u1")])
@every_layout
def test_labels_of_positions_may_be_lists_and_arrays(layout, write):
    head = make_head(layout)
    generator = torch.Generator().manual_seed(0)
    output, labels = head(features(layout, generator)), make_target(layout, generator, "labels")
    criterion = BalancedLoss(head)
    assert torch.equal(criterion(output, write(labels)), criterion(output, labels))


@pytest.mark.parametrize(
    ("layout", "target", "words"),
    [
        ("maps", torch.zeros(2, dtype=torch.int64), r"labels of shape \(2, 3, 5\) or soft.*\(2, 6, 3, 5\).*got \(2,\)"),
        ("maps", torch.zeros(30, dtype=torch.int64), r"\(2, 3, 5\)"),
        ("maps", torch.zeros(2, 5, 3, dtype=torch.int64), r"\(2, 3, 5\)"),
        ("maps", torch.full((2, 3, 5, 6), 1 / 6), r"\(2, 6, 3, 5\).*got \(2, 3, 5, 6\)"),
        ("maps", torch.zeros(2, 1, 3, 5, dtype=torch.int64), r"target\.squeeze\(1\)"),
        ("maps", torch.zeros(2, 6, 3, 5, dtype=torch.int64), "floating point"),
        ("maps", torch.zeros(2, 3, 5, dtype=torch.uint8), r"target\.long\(\)"),
        ("maps", torch.full((2, 3, 5), 6), "from 6 to 6"),
        ("tokens", torch.full((2, 6, 3), 1 / 6), r"\(2, 3\) or soft targets of shape \(2, 3, 6\)"),
        ("tokens", torch.zeros(2, 3), r"target\.long\(\)"),
        ("tokens", torch.zeros(2, 3, 1, dtype=torch.int64), r"target\.squeeze\(-1\)"),
        ("tokens", np.zeros((2, 4)), r"\(2, 3\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("consumer", ["loss", "assigner"])
def test_targets_that_do_not_fit_the_positions_are_refused(consumer, layout, target, words):
    head = make_head(layout)
    assigner = DynamicAssigner(head)
    output = head(features(layout, torch.Generator().manual_seed(0)))
    with pytest.raises(LabelError, match=words):
        (BalancedLoss(assigner) if consumer == "loss" else assigner.update)(output, target)
    assert not assigner.class_counts.any()


@pytest.mark.parametrize(("layout", "advice"), [("maps", r"movedim\(-1, 1\)"), ("tokens", r"movedim\(1, -1\)")])
def test_classes_in_another_dimension_are_refused(layout, advice):
    head = make_head(layout)
    output = head(features(layout, torch.Generator().manual_seed(0)))
    moved = output.movedim(1, -1) if layout == "maps" else output.movedim(-1, 1)
    with pytest.raises(ShapeError, match=advice):
        BalancedLoss(head)(moved, make_target(layout, torch.Generator(), "labels"))


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_a_compiled_loss_over_maps_is_one_graph(training_output):
    torch.compiler.reset()
    head = make_head("maps", training_output)
    generator = torch.Generator().manual_seed(0)
    output, labels = head(features("maps", generator)).detach(), make_target("maps", generator, "ignoring")
    criterion = PrototypeCrossEntropyLoss(head, ignore_index=IGNORED)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(output, labels), criterion(output, labels))


def test_a_segmentation_model_learns_labels_of_its_pixels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    convert_model(model, classifier="2", dim=3)
    labels = torch.randint(0, 4, (8, 6, 6))
    images = F.one_hot(labels, 4)[..., :3].permute(0, 3, 1, 2).float()
    assigner = DynamicAssigner(model)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(40):
        criterion(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert assigner.step().unseen == ()
    assert (model.eval()(images).argmax(dim=1) == labels).float().mean() > 0.95
