"""Heads fitted to a trained backbone's features once more: what is minimised, what moves, what the new head is."""

import copy
import dataclasses
import io
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from clouds import assert_same_state, batched, clouds, make_head, normal
from compatible import in_front
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    LabelError,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    ShapeError,
    compress_head,
    convert_model,
    describe,
    fit_head,
    fit_logit_scale,
    get_heads,
    refit_head,
    restore_model,
    to_linear,
)
from hyperproto.affine import affine
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.fitting import data, hand_over, unit_fit
from hyperproto.fitting.closed_form import least_squares
from hyperproto.fitting.components import principal_components
from hyperproto.fitting.hand_over import start_with_free_vectors, start_with_prototypes
from hyperproto.fitting.held_out import held_out, sample_keys
from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.teacher import find_teacher, first_teacher, refined
from hyperproto.fitting.unit_head import Coordinates, Score
from hyperproto.testing import SEEDS, check_assignment, check_bank


def class_mean_loss(head: HypersphericalHead, features: torch.Tensor, labels: torch.Tensor, scale: float) -> float:
    """Mean over the classes present of the mean cross-entropy over a class, by NumPy in float64."""
    with torch.no_grad():
        logits = scale / float(head.logit_scale) * head.eval()(features).double().numpy()
    log_sums = np.logaddexp.reduce(logits, axis=1)
    losses = log_sums - logits[np.arange(len(labels)), labels.numpy()]
    return float(np.mean([losses[labels.numpy() == c].mean() for c in labels.unique().tolist()]))


def small_model(num_classes: int = 6, dim: int = 6, **options: object) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, num_classes))
    return convert_model(model, dim=dim, classifier="2", **options)


def overlapping(num_classes: int = 6, width: int = 8, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Clouds that no head can tell apart entirely, so that there is a finite best one; unequally many of each."""
    features, labels = clouds(num_classes, width, **{"apart": 0.5, "per_class": 60, **options})
    kept = torch.arange(len(labels)) // num_classes % (labels + 1) == 0
    return features[kept], labels[kept]


def weighed(batches: list[tuple[torch.Tensor, torch.Tensor]], num_classes: int) -> Samples:
    return Samples.weighed(batches, num_classes, torch.device("cpu"), alike=True, process_group=None)


# What is minimised


def test_least_squares_in_closed_form():
    """Class-weighted least squares, whose minimum NumPy's lstsq knows."""
    features, labels = overlapping()
    weight = nn.Parameter(torch.zeros(6, 8))

    def squares(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (rows @ weight.T - F.one_hot(own, 6)).square().sum(dim=1)

    samples = weighed(batched(features, labels), 6)
    samples.descend(squares, [weight], iterations=200, at_a_time=50, smallest_gain=0.0)
    counts = np.bincount(labels.numpy())
    root = np.sqrt(1.0 / counts[labels.numpy()])[:, None]
    expected = np.linalg.lstsq(root * features.numpy(), root * np.eye(6)[labels.numpy()], rcond=None)[0]
    np.testing.assert_allclose(weight.detach().numpy(), expected.T, atol=2e-4)


def coordinates_of(found: data.HeldFeatures) -> Coordinates:
    return Coordinates.of_samples(found.scatters[0], found.all(0, classes_alike=True), centred=True)


def held(features: torch.Tensor, labels: torch.Tensor, num_classes: int = 6) -> data.HeldFeatures:
    model = nn.Sequential(make_head(num_classes, features.shape[1], 4))
    return data.HeldFeatures(model, (model[0],), batched(features, labels), process_group=None)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_stand_in_is_the_regression_on_the_prototypes(intercept, monkeypatch):
    """But for the shrinking of covariances, which has tests of its own."""
    monkeypatch.setattr("hyperproto.fitting.statistics.shrunk_covariance", lambda covariance, num_samples: covariance)
    features, labels = clouds(6, 8, apart=0.5, per_class=2000)
    found, prototypes = held(features, labels), make_head(6, 8, 4).class_prototypes
    samples = found.all(0, classes_alike=True)
    coordinates = Coordinates.of_samples(found.scatters[0], samples, centred=intercept)
    head = least_squares(samples, coordinates, class_prototypes=prototypes, intercept=intercept)

    rows = coordinates.of(features).double().numpy()
    rows = np.hstack([rows, np.ones((len(rows), 1))]) if intercept else rows
    root = np.sqrt(1.0 / np.bincount(labels.numpy())[labels.numpy()])[:, None]
    expected = np.linalg.lstsq(root * rows, root * prototypes.double().numpy()[labels.numpy()], rcond=None)[0].T
    np.testing.assert_allclose(head.matrix.numpy(), expected[:, :8], atol=1e-3)
    np.testing.assert_allclose(head.offset.numpy(), expected[:, 8] if intercept else np.zeros(4), atol=1e-3)


def test_the_teacher_is_the_penalised_softmax():
    """Of full rank the penalty on two factors is one on the singular values of their product, which is convex."""
    features, labels = overlapping()
    found = held(features, labels)
    samples, penalty = found.all(0, classes_alike=True), 0.02
    coordinates = coordinates_of(found)
    teacher = dataclasses.replace(first_teacher(coordinates, samples, 6, rank=6), penalty=penalty)
    teacher = refined(teacher, samples, torch.zeros(6), iterations=2000, smallest_gain=0.0)

    x = features.double().numpy()
    share = 1.0 / np.bincount(labels.numpy())[labels.numpy()] / 6
    x -= share @ x
    x /= np.sqrt(share @ np.square(x).mean(axis=1))

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = x @ weight.T + bias
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(x)), labels.numpy()]
        singular_values = np.linalg.svd(weight, compute_uv=False)
        return float(share @ losses + penalty * singular_values.sum() + 0.5 * penalty * bias @ bias)

    weight, bias = (teacher.vectors @ teacher.matrix).double().numpy(), teacher.bias.double().numpy()
    reached = objective(weight, bias)
    generator = np.random.default_rng(0)
    for length in (1e-1, 1e-2):
        for _ in range(50):
            step = length * generator.normal(size=weight.shape), length * generator.normal(size=bias.shape)
            assert objective(weight + step[0], bias + step[1]) > reached - 1e-6
    for share_of_it in (0.9, 0.99, 1.01, 1.1):
        assert objective(share_of_it * weight, bias) > reached


@pytest.mark.parametrize(("compress", "num_classes"), [(False, 60), (True, 60), (True, 6)])
def test_answers_are_handed_on_at_three_quarters_of_the_teachers_scale(compress, num_classes, monkeypatch):
    teachers = []

    def find(*args, **options):
        teachers.append(find_teacher(*args, **options))
        return teachers[-1]

    monkeypatch.setattr(unit_fit, "find_teacher", find)
    # Too few to hold any out: the scale at which answers are handed on is the one that is left.
    features, labels = clouds(num_classes, 80, per_class=5)
    model = nn.Sequential(make_head(num_classes, 80, 6))
    fit = partial(compress_head, dim=4) if compress else refit_head
    assert fit(model, batched(features, labels)).held_out is None
    [teacher] = teachers
    x = (features - teacher.coordinates.centre).double().numpy() * teacher.coordinates.inverse_spread
    lengths = np.linalg.norm(x @ teacher.matrix.double().numpy().T, axis=1)
    lengths *= np.linalg.norm(teacher.vectors.double().numpy(), axis=1)[labels.numpy()]
    assert (0.75 * lengths.mean() < 6.0) == (num_classes == 6)
    assert float(model[0].logit_scale) == pytest.approx(max(6.0, 0.75 * lengths.mean()), rel=1e-5)


def test_on_a_simplex_held_out_samples_choose_the_share_of_the_scale(monkeypatch):
    features, labels = clouds(10, 24, apart=0.7, per_class=600)
    losses = {}
    for dim in (10, 8):
        for shares in ((0.75, 1.0), (0.75,), (1.0,)):
            monkeypatch.setattr(hand_over, "SHARES_OF_SCALE", shares)
            losses[dim, shares] = refit_head(make_head(10, 24, dim), batched(features, labels)).held_out.log_loss
    assert losses[10, (1.0,)] == losses[10, (0.75, 1.0)] < losses[10, (0.75,)]
    assert losses[8, (1.0,)] != losses[8, (0.75, 1.0)] == losses[8, (0.75,)]


def test_directions_that_a_teacher_does_without_do_not_blind_the_start():
    features, labels = clouds(20, 24)
    found = held(features, labels, num_classes=20)
    samples = found.all(0, classes_alike=True)
    teacher = first_teacher(coordinates_of(found), samples, 20, rank=12)
    teacher = refined(dataclasses.replace(teacher, penalty=1e-3), samples, torch.zeros(20), iterations=20)
    left, lengths, right = torch.linalg.svd(teacher.vectors, full_matrices=False)
    lengths[8:] *= 1e-4  # what a penalty leaves of them
    teacher = dataclasses.replace(teacher, vectors=left * lengths @ right, bias=teacher.bias + normal(20))
    start = start_with_free_vectors(teacher, 12, torch.arange(20))
    assert float(start.cosines(features).gather(1, labels[:, None]).mean()) > 0.5


@pytest.mark.parametrize("dim", [5, 6, 8])
def test_on_a_simplex_classes_start_ranked_as_by_the_teacher(dim):
    features, labels = overlapping()
    found = held(features, labels)
    coordinates = coordinates_of(found)
    teacher = first_teacher(coordinates, found.all(0, classes_alike=True), 6, rank=dim)
    teacher = dataclasses.replace(teacher, bias=normal(6))
    prototypes = PrototypeBank(6, dim).prototypes[torch.tensor([3, 1, 0, 5, 4, 2])]
    cosines = start_with_prototypes(teacher, prototypes, intercept=True).cosines(features)
    assert torch.equal(cosines.argsort(dim=1), teacher.logits(features).argsort(dim=1))


@pytest.mark.parametrize("dim", [6, 3])
@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_a_refit_is_better_on_samples_that_nobody_has_seen(projection, dim):
    features, labels = clouds(6, 24, apart=0.7, per_class=400)
    seen, unseen = slice(0, 240), slice(240, None)
    for start in (lambda head: None, lambda head: fit_head(head, [(features[seen], labels[seen])])):
        head = make_head(6, 24, dim, projection=projection)
        start(head)
        before = class_mean_loss(
            head, features[unseen], labels[unseen], fit_scale(head, features[unseen], labels[unseen])
        )
        refit_head(head, batched(features[seen], labels[seen]))
        after = class_mean_loss(
            head, features[unseen], labels[unseen], fit_scale(head, features[unseen], labels[unseen])
        )
        assert after < before + 0.05


def fit_scale(head: HypersphericalHead, features: torch.Tensor, labels: torch.Tensor) -> float:
    return fit_logit_scale(copy.deepcopy(head), [(features, labels)], match="likelihood")


# What is held out


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 35), min_size=2, max_size=6))
@settings(max_examples=30)
def test_a_tenth_of_each_class_is_held_out_and_none_of_small_ones(seed, sizes):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    keys = sample_keys(normal(len(labels), 5, seed=seed))
    chosen = held_out(keys, labels, torch.device("cpu"))
    assert [int(chosen[labels == c].sum()) for c in range(len(sizes))] == [(size + 4) // 10 for size in sizes]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held_out(keys[order], labels[order], torch.device("cpu")), chosen[order])


def test_equal_samples_are_on_one_side():
    features, labels = overlapping()
    chosen = held_out(sample_keys(features), labels, torch.device("cpu"))
    twice = held_out(sample_keys(features.repeat(2, 1)), labels.repeat(2), torch.device("cpu"))
    assert torch.equal(twice, chosen.repeat(2))
    assert 0 < int(chosen.sum()) < len(chosen)


def test_classes_that_are_all_small_are_fitted_without_a_judge():
    features, labels = clouds(6, 8, per_class=5)
    head = make_head(6, 8, 6)
    fit = refit_head(head, batched(features, labels))
    assert fit.held_out is None
    assert fit.accuracy > 0.95


def test_the_report_says_what_was_held_out_and_what_it_says():
    features, labels = overlapping()
    fit = refit_head(make_head(6, 8, 6), batched(features, labels))
    chosen = held_out(sample_keys(features), labels, torch.device("cpu"))
    assert fit.held_out.num_samples == int(chosen.sum())
    assert fit.held_out.is_better
    assert not fit.held_out.was_seen
    assert fit.held_out.accuracy > fit.held_out.accuracy_before
    assert fit.held_out.log_loss < fit.held_out.log_loss_before
    assert "samples held out: accuracy" in str(fit)


def test_a_head_of_more_data_stays_as_it_is():
    features, labels = clouds(10, 40, apart=0.3, per_class=1000)
    head = make_head(10, 40, 10, bank="simplex")
    fit_head(head, batched(features[2000:], labels[2000:]))
    before = copy.deepcopy(head.state_dict())
    fit = refit_head(head, batched(features[:300], labels[:300]))
    assert not fit.held_out.is_better
    assert_same_state(head, before)


def folded_clouds(num_each: int, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of 20 classes that are no Gaussian clouds: a layer's activations of three clouds for each class."""
    labels = torch.arange(20).repeat(num_each)
    places = normal(60, 20)[3 * labels + torch.arange(len(labels)) // 20 % 3]
    folded = (places + normal(len(labels), 20, seed=draw)) @ normal(20, 256, seed=1) / 20**0.5
    return F.relu(folded + 0.3 * normal(256, seed=2)), labels


def right(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float((head(features).argmax(dim=1) == labels).float().mean())


def test_a_closed_form_that_follows_its_samples_does_not_keep_a_better_fit_away():
    samples, others = folded_clouds(300, draw=3), folded_clouds(200, draw=4)
    head = make_head(20, 256, 20, bank="simplex")
    follows = fit_head(head, batched(*samples, 500)).accuracy
    before = right(head, *others)
    assert follows > before + 0.03
    fit = refit_head(head, batched(*samples, 500))
    assert fit.held_out.was_seen
    assert fit.held_out.is_better
    assert fit.held_out.accuracy_before == pytest.approx(before, abs=0.04)  # and not what it was on its own samples
    assert right(head, *others) > before + 0.01


@pytest.mark.parametrize("num_each", [10, 30, 100])
def test_a_good_head_is_not_taken_for_the_closed_form_of_a_few_other_samples(num_each):
    samples, few, others = folded_clouds(600, draw=3), folded_clouds(num_each, draw=4), folded_clouds(100, draw=5)
    head = make_head(20, 256, 20, bank="simplex")
    fit_head(head, batched(*samples, 500))
    before = right(head, *others)
    refit_head(head, batched(*few, 500))
    assert right(head, *others) > before - 0.01


def test_class_counts_stand_for_labels_that_count_alike():
    features, labels = overlapping(per_class=200)
    alike, adjusted, plain = (make_head(6, 8, 6, bank="simplex") for _ in range(3))
    refit_head(alike, batched(features, labels))
    refit_head(adjusted, batched(features, labels), class_counts=labels.bincount())
    refit_head(plain, batched(features, labels), class_counts=[1] * 6)

    def predicted(head: HypersphericalHead) -> np.ndarray:
        return np.bincount(head(features).argmax(dim=1).numpy(), minlength=6)

    # The first class is the most frequent one.
    assert predicted(plain)[0] > predicted(alike)[0]
    assert predicted(plain)[0] > predicted(adjusted)[0]


@given(seed=SEEDS, repeats=st.integers(2, 4), label=st.integers(0, 4))
@settings(max_examples=10)
def test_repeating_the_samples_of_a_class_changes_nothing(seed, repeats, label):
    features, labels = overlapping(5, seed=seed)
    more = labels == label
    repeated = torch.cat([features, *[features[more]] * repeats]), torch.cat([labels, *[labels[more]] * repeats])
    plain, other = make_head(5, 8, 4), make_head(5, 8, 4)
    refit_head(plain, batched(features, labels), iterations=5)
    refit_head(other, batched(*repeated), iterations=5)
    torch.testing.assert_close(other.embed(features), plain.embed(features), atol=1e-3, rtol=0)


@given(seed=SEEDS, size=st.integers(1, 200))
@settings(max_examples=10)
def test_batches_and_their_order_do_not_matter(seed, size):
    features, labels = overlapping(5, seed=seed, per_class=100)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    whole, parts = make_head(5, 8, 4), make_head(5, 8, 4)
    # Each iteration makes more of the rounding, by which sums in another order differ.
    first = refit_head(whole, [(features, labels)], iterations=2)
    second = refit_head(parts, batched(features[order], labels[order], size), iterations=2)
    assert_same_state(parts, whole, atol=1e-3, rtol=1e-3)
    assert (second.num_samples, second.unseen) == (first.num_samples, first.unseen) == (len(labels), ())


@pytest.mark.parametrize(
    ("num_classes", "limit", "rows"),
    [
        (6, {"BATCH_NUMBERS": 8 * 30}, 30),
        (6, {"BATCH_ROWS": 25}, 25),
        (20, {"BATCH_NUMBERS": 20 * 30}, 30),
        (6, {"BATCH_NUMBERS": 7}, 1),
    ],
)
def test_features_are_regrouped_to_bound_memory(num_classes, limit, rows, monkeypatch):
    """Eight features: with twenty classes it is the cosines that take the memory."""
    for name, value in limit.items():
        monkeypatch.setattr(data, name, value)
    features, labels = overlapping()
    head = make_head(num_classes, 8, 4)
    found = data.HeldFeatures(head, (head,), batched(features, labels, size=7), process_group=None)
    sizes = [len(own) for _, own in found.all(0, classes_alike=True).batches]
    assert sum(sizes) == len(labels)
    assert rows / 2 < max(sizes) <= rows


def test_a_likelier_head_is_better_as_long_as_no_fewer_samples_are_right():
    present = Score(accuracy=0.5, log_loss=1.0, logit_scale=16.0)
    for accuracy, log_loss, is_better in (
        (0.5, 0.9, True),
        (0.6, 0.9, True),
        (0.6, 1.0, False),
        (0.46, 0.9, True),  # of 100 samples, 5 more or fewer are chance
        (0.44, 0.9, False),
    ):
        assert Score(accuracy, log_loss, 16.0).is_better_than(present, num_samples=100) == is_better
    assert not Score(0.46, 0.9, 16.0).is_better_than(present, num_samples=1000)
    assert not Score(0.99, 0.9, 16.0).is_better_than(Score(1.0, 1.0, 16.0), num_samples=10)


@pytest.mark.parametrize("fit", [fit_head, partial(refit_head, iterations=2)], ids=["fit_head", "refit_head"])
def test_a_default_device_is_not_asked_for(fit):
    features, labels = overlapping()
    loader = batched(features[labels > 0], labels[labels > 0])  # of one label there are no samples
    model = nn.Sequential(make_head(6, 8, 6))
    twin = copy.deepcopy(model)
    fit(model, loader)
    with torch.device("meta"):
        fit(twin, loader)
    assert_same_state(twin, model)


# What moves


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_a_refit_moves_the_projection_and_nothing_else(projection):
    model = small_model(projection=projection).train()
    model[1].eval()
    [head] = get_heads(model).values()
    head.assign_(torch.tensor([3, 1, 0, 5, 4, 2]))
    features, labels = overlapping()
    F.cross_entropy(model(features), labels).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    parameters = dict(model.named_parameters())
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    loader = DataLoader(TensorDataset(features, labels), batch_size=32, shuffle=True)
    state = torch.get_rng_state()
    with torch.no_grad():  # as many evaluation functions are
        fit = refit_head(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in model.modules()] == modes
    assert not head.projection._forward_pre_hooks
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trains = {f"2.{name}" for name, _ in head.named_parameters()}
    assert changed == trains | {"2.logit_scale"}
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters())
    right = float((model.eval()(features).argmax(dim=1) == labels).float().mean())
    assert fit.accuracy == pytest.approx(right, abs=1e-6)


def test_the_same_data_give_the_same_head():
    first, second = make_head(6, 8, 4), make_head(6, 8, 4)
    refit_head(first, batched(*overlapping()))
    torch.manual_seed(7)
    refit_head(second, batched(*overlapping()))
    assert_same_state(second, first)


def test_frozen_projections_are_fitted_and_stay_frozen():
    head = make_head(6, 8, 4).requires_grad_(False)
    before = head.projection[0].weight.clone()
    refit_head(head, batched(*overlapping()), iterations=3)
    assert not torch.equal(head.projection[0].weight, before)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_what_is_bound_to_a_refitted_head_goes_on():
    model = small_model()
    assigner = DynamicAssigner(model)
    criterion = PrototypeCrossEntropyLoss(assigner)
    features, labels = overlapping()
    refit_head(model, batched(features, labels), iterations=3)
    criterion(model.train()(features), labels).backward()
    assert assigner.step().unseen == ()
    assert assigner.class_counts.tolist() == torch.bincount(labels, minlength=6).tolist()
    check_assignment(model[2])


# Where features come from


@pytest.mark.parametrize(
    "name",
    in_front(
        ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224", "resnetv2_50"],
        "test_resnet",
        "deit_tiny_distilled_patch16_224",
    ),
)
def test_models_of_timm(name):
    options = {"img_size": 64} if "deit" in name else {}
    options |= {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)} if "v2" in name else {}
    model = convert_model(timm.create_model(name, num_classes=4, **options), dim=4, bank="simplex")
    labels = torch.arange(24) % 4
    size = 160 if name == "test_vit" else 64
    colours = normal(4, 3)[labels][:, :, None, None]
    loader = batched(colours + 0.1 * normal(24, 3, size, size), labels, size=8)

    @torch.no_grad()
    def accuracy() -> float:
        right = [(model.eval()(images).argmax(dim=1) == own).float().mean() for images, own in loader]
        return float(torch.stack(right).mean())

    # Six samples of each class; a penalty may give one up.
    reported = refit_head(model, loader, iterations=30).accuracy
    assert accuracy() > 0.9
    heads = list(get_heads(model).values())
    if len(heads) > 1:
        assert not torch.equal(heads[0].projection[0].weight, heads[1].projection[0].weight)
        assert heads[0].logit_scale == heads[1].logit_scale  # or one could not read what the model returns
        with pytest.raises(ArgumentError, match=r"with one head, got 2, at head, head_dist\."):
            compress_head(model, loader, dim=2)
    else:
        assert reported == pytest.approx(accuracy())
        assert compress_head(model, loader, dim=2, iterations=30).accuracy == pytest.approx(accuracy())
        assert accuracy() > 0.9


def test_channels_first_and_tokens_are_rows():
    features, labels = overlapping(per_class=80)
    order = labels.argsort(stable=True)
    order = order[: len(order) // 4 * 4]
    features, labels = features[order], labels[order]
    labels = labels[::4].repeat_interleave(4)  # four rows of one label make one sample with four positions
    plain, tokens = make_head(6, 8, 4), make_head(6, 8, 4)
    maps = ChannelsFirstHead(8, 6, dim=4, bank="random").eval()
    refit_head(plain, batched(features, labels), iterations=5)
    refit_head(tokens, [(features.view(-1, 4, 8), labels[::4])], iterations=5)
    refit_head(maps, [(features.view(-1, 2, 2, 8).permute(0, 3, 1, 2), labels[::4])], iterations=5)
    assert_same_state(tokens, plain, atol=1e-3, rtol=1e-3)
    assert_same_state(maps, plain, atol=1e-3, rtol=1e-3)


def test_kept_features_do_not_keep_what_they_are_views_of():
    class FirstToken(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens[:, 0]

    features, labels = overlapping()
    model = nn.Sequential(FirstToken(), make_head(6, 8, 4))
    tokens = features[:, None].repeat(1, 9, 1)
    found = data.HeldFeatures(model, (model[1],), [(tokens, labels)], process_group=None)
    batches = found.all(0, classes_alike=True).batches
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows, _ in batches)


@given(sizes=st.lists(st.integers(0, 9), max_size=6), size=st.integers(1, 7))
def test_samples_are_regrouped_in_their_order(sizes, size):
    regrouped, labels = data._Regrouped(size), torch.arange(sum(sizes))
    for own in labels.split(sizes):
        regrouped.add(own[:, None].float(), own)
    batches = regrouped.batches()
    assert all(len(own) == size for _, own in batches[:-1])
    assert all(0 < len(own) <= size for _, own in batches)
    assert [label for _, own in batches for label in own.tolist()] == labels.tolist()
    assert all(torch.equal(rows[:, 0].long(), own) for rows, own in batches)


@pytest.mark.parametrize("fit", [refit_head, partial(compress_head, dim=3)], ids=["refit_head", "compress_head"])
def test_fits_have_the_iterations_that_the_tables_were_made_with(fit, monkeypatch):
    asked, descend = [], Samples.descend

    def noting(self: Samples, *arguments: object, iterations: int, **options: object) -> None:
        asked.append(iterations)
        descend(self, *arguments, iterations=min(iterations, 2), **options)

    monkeypatch.setattr(Samples, "descend", noting)
    fit(nn.Sequential(nn.Identity(), make_head(6, 8, 6)), batched(*overlapping()))
    assert max(asked) == 200


@pytest.mark.parametrize("dtype", in_front([torch.bfloat16, torch.float16], torch.bfloat16))
def test_half_precision(dtype):
    features, labels = clouds(6, 8, apart=6.0)
    model = nn.Sequential(nn.Identity(), make_head(6, 8, 6, bank="simplex")).to(dtype)
    loader = batched(features.to(dtype), labels)
    assert refit_head(model, loader).accuracy > 0.95
    assert model[1].projection[0].weight.dtype == dtype
    assert compress_head(model, loader, dim=3).accuracy > 0.95
    assert model[1].projection[0].weight.dtype == dtype
    assert model[1].bank.prototypes.dtype == model[1].projection[1].weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert refit_head(make_head(6, 8, 6), batched(features, labels)).accuracy > 0.95


def test_a_wrapped_model_is_refitted_like_the_bare_one_and_not_compressed():
    bare = small_model()
    loader = batched(*overlapping())
    compiled, replicated = torch.compile(copy.deepcopy(bare), backend="eager"), nn.DataParallel(copy.deepcopy(bare))
    fits = [refit_head(model, loader, iterations=5) for model in (bare, compiled, replicated)]
    assert fits[1:] == fits[:1] * 2
    for inner, wrapped in ((compiled._orig_mod, compiled), (replicated.module, replicated)):
        assert_same_state(inner, bare)
        with pytest.raises(HeadNotFoundError, match=r"wrapped.*: compress_head\(model, ...\), then"):
            compress_head(wrapped, loader, dim=3)


# Fewer dimensions


def test_the_start_is_the_principal_components_of_the_linear_logits():
    features, labels = overlapping()
    head = make_head(6, 8, 6, bank="simplex")
    head.assign_(torch.tensor([3, 1, 0, 5, 4, 2]))
    with torch.no_grad():  # statistics of a projection that has trained
        head.train().embed(features)
        head.eval().projection[1].weight.uniform_(0.5, 2.0)
        head.projection[1].bias.uniform_(-1.0, 1.0)
        found = data.HeldFeatures(nn.Sequential(head), (head,), batched(features, labels), process_group=None)
        to_logits = head.class_prototypes.double() @ affine(head.projection, head.in_features)[0]
        coordinates = coordinates_of(found)
        start = principal_components(to_logits, found.scatters[0], 2, coordinates)
        logits = (head.projection(features) @ head.class_prototypes.T).double().numpy()
        components = (coordinates.project(features, start.matrix) + start.offset).double().numpy()
    centred = logits - logits.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ directions[:2].T @ directions[:2]
    np.testing.assert_allclose(components @ start.vectors.double().numpy().T, expected, atol=1e-3)
    np.testing.assert_allclose(np.cov(components.T), np.eye(2), atol=1e-2)
    assert np.abs(expected - centred).max() > 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_a_compressed_head_beats_its_start_and_a_bank_that_knows_nothing(dim):
    features, labels = clouds(8, 24, apart=1.0, per_class=400)
    seen, unseen = slice(0, 400), slice(400, None)
    loader = batched(features[seen], labels[seen])

    def accuracy(head: nn.Module) -> float:
        return float((head(features[unseen]).argmax(dim=1) == labels[unseen]).float().mean())

    model, blind = nn.Sequential(make_head(8, 24, 8, bank="simplex")), make_head(8, 24, dim)
    fit_head(model, loader)
    found = data.HeldFeatures(model, (model[0],), loader, process_group=None)
    to_logits = model[0].class_prototypes.double() @ affine(model[0].projection, 24)[0]
    start = principal_components(to_logits, found.scatters[0], dim, coordinates_of(found))
    started = float((start.cosines(features[unseen]).argmax(dim=1) == labels[unseen]).float().mean())
    fit = compress_head(model, loader, dim=dim)
    refit_head(blind, loader)
    assert accuracy(model) > max(started - 0.01, accuracy(blind) + 0.1)
    right = float((model(features[seen]).argmax(dim=1) == labels[seen]).float().mean())
    assert fit.accuracy == pytest.approx(right, abs=1e-6)


@pytest.mark.filterwarnings("ignore:training_output=.embedding. saves nothing:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_the_new_head_takes_the_old_ones_place(training_output):
    model = small_model(bank="simplex", training_output=training_output).train()
    linear, old = model.state_dict(), model[2]
    backbone = {name: value.clone() for name, value in linear.items() if not name.startswith("2.")}
    criterion, assigner = BalancedLoss(old), DynamicAssigner(model)
    features, labels = overlapping()
    fit = compress_head(model, batched(features, labels), dim=3, scale=20.0, iterations=5)
    head = model[2]
    assert head is not old
    assert (head.dim, head.num_classes, head.training_output) == (3, 6, training_output)
    assert head.training
    assert head.projection.training
    assert float(head.logit_scale) == 20.0
    assert torch.equal(head.assignment, torch.arange(6))
    check_bank(head.bank)
    assert {name for name, _ in head.named_parameters()} == {
        f"projection.{name}" for name in ("0.weight", "1.weight", "1.bias")
    }
    assert all(parameter.requires_grad and parameter.grad is None for parameter in head.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in backbone.items())
    assert "6 classes on prototypes in dimension 3" in describe(model)
    assert f"{sum(p.numel() for p in model.parameters()):,} after" in describe(model)
    assert "246 before" in describe(model)  # 8 * 16 + 16 + 16 * 6 + 6
    for bound in (lambda: criterion(model(features), labels), assigner.step):
        with pytest.raises(HeadNotFoundError, match="compress_head"):
            bound()
    # Training can go on.
    assigner = DynamicAssigner(model)
    BalancedLoss(assigner)(model(features), labels).backward()
    assert assigner.step().unseen == ()
    assert fit.num_samples == len(labels)


def test_the_way_back_and_the_way_out_are_as_before():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
    original = model[2]
    convert_model(model, dim=6, classifier="2")
    features, labels = overlapping()
    compress_head(model, batched(features, labels), dim=3, iterations=5)
    predictions = model.eval()(features).argmax(dim=1)
    assert torch.equal(to_linear(copy.deepcopy(model))(features).argmax(dim=1), predictions)
    assert torch.equal(copy.deepcopy(model)(features).argmax(dim=1), predictions)
    head = model[2]
    assert restore_model(model)[2] is original
    assert head.placement.taken_out


def test_a_checkpoint_brings_its_bank_along():
    model = small_model(bank="simplex")
    features, labels = overlapping()
    compress_head(model, batched(features, labels), dim=3, iterations=5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = small_model(dim=None, bank=PrototypeBank.from_tensor(state["2.bank.prototypes"]))
    other.load_state_dict(state)
    assert torch.equal(other.eval()(features), model.eval()(features))


def test_a_head_that_a_user_put_in_can_be_replaced():
    model = nn.Sequential(nn.Identity(), make_head(6, 8, 6, bank="simplex"))
    assert compress_head(model, batched(*overlapping()), dim=3).num_samples == len(overlapping()[1])
    assert model[1].dim == 3
    assert not model[1].training


def test_heads_over_channels_stay_so():
    model = convert_model(nn.Sequential(nn.Conv2d(8, 6, 1)), dim=6, classifier="0")
    features, labels = overlapping()
    compress_head(model, batched(features[:, :, None, None], labels), dim=3)
    assert isinstance(model[0], ChannelsFirstHead)
    assert model(features[:, :, None, None]).shape == (len(labels), 6, 1, 1)


def test_more_dimensions_than_the_features_have():
    features, labels = overlapping(8, width=4)
    model = nn.Sequential(make_head(8, 4, 8, bank="simplex"))
    before = float((model(features).argmax(dim=1) == labels).float().mean())
    assert compress_head(model, batched(features, labels), dim=8).accuracy > before + 0.05
    assert torch.isfinite(model[0].projection[0].weight).all()


def test_labels_without_samples():
    features, labels = overlapping()
    present = labels < 4
    model = nn.Sequential(make_head(6, 8, 6, bank="simplex"))
    fit = refit_head(model, batched(features[present], labels[present]))
    assert fit.unseen == (4, 5)
    assert compress_head(model, batched(features[present], labels[present]), dim=3).unseen == (4, 5)
    check_bank(model[0].bank)
    assert float(model[0].class_prototypes[4] @ model[0].class_prototypes[5]) < 0.9  # which nothing brings together
    assert float((model(features[present]).argmax(dim=1) == labels[present]).float().mean()) > 0.4


def test_labels_without_samples_start_alike_whatever_was_drawn_before():
    features, labels = overlapping()
    loader = batched(features[labels < 4], labels[labels < 4])
    models = [nn.Sequential(make_head(6, 8, 6)) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        compress_head(model, loader, dim=3, iterations=2)
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(*models)


# Errors

ALTERNATING = torch.arange(8) % 4


@pytest.mark.parametrize("dim", [None, 2], ids=["refit", "compress"])
@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ArgumentError, "no samples"),
        ([(normal(8, 6), torch.tensor([0, 1, 2, 4] * 2))], LabelError, "from 0 to 4"),
        ([(normal(8, 6), F.one_hot(ALTERNATING, 4).float())], LabelError, "without mixup"),
        ([(normal(8, 6), torch.arange(7) % 4)], ShapeError, "8 samples"),
        ([(normal(8, 5), ALTERNATING)], ShapeError, r"\(8, 5\)"),
        ([(torch.full((8, 6), torch.nan), ALTERNATING)], ArgumentError, "finite"),
        ([(torch.ones(8, 6), ALTERNATING)], ArgumentError, "nothing to fit"),
        ([(normal(8, 6), torch.full((8,), 2))], ArgumentError, "several labels"),
    ],
)
def test_data_in_error_leave_the_model_as_it_was(dim, data, error, words):
    model = nn.Sequential(nn.Identity(), make_head(4, 6, 4))
    model.train()
    before, head = copy.deepcopy(model.state_dict()), model[1]
    with pytest.raises(error, match=words):
        refit_head(model, data) if dim is None else compress_head(model, data, dim=dim)
    assert_same_state(model, before)
    assert model[1] is head
    assert not head.placement.taken_out
    assert all(each.training for each in model.modules())
    assert not head.projection._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0.0}, "scale must be .* positive in float32, got 0.0"),
        ({"scale": float("inf")}, "scale must be .* finite .*, got inf"),
        ({"iterations": 0}, "iterations to be .* at least 1, got iterations=0"),
        ({"class_counts": [1, 2, 0, 4]}, "class_counts must be positive"),
    ],
)
def test_options_out_of_range(options, words):
    model = nn.Sequential(make_head(4, 6, 4))
    with pytest.raises(ArgumentError, match=words):
        refit_head(model, batched(*clouds(4, 6)), **options)
    with pytest.raises(ArgumentError, match=words):
        compress_head(model, batched(*clouds(4, 6)), dim=2, **options)


@pytest.mark.parametrize("dim", [1, 5])
def test_dimensions_out_of_range(dim):
    with pytest.raises(ArgumentError, match=rf"dim to be a whole number \(int\) in \[2, 4\], got dim={dim}"):
        compress_head(nn.Sequential(make_head(4, 6, 4)), batched(*clouds(4, 6)), dim=dim)


def test_heads_that_cannot_be_fitted_or_replaced():
    loader = batched(*clouds(4, 6))
    with pytest.raises(ArgumentError, match="nothing to fit"):
        refit_head(make_head(4, 6, 6, projection="none"), loader)
    for projection in ("none", "linear"):
        with pytest.raises(ArgumentError, match=r"linear\+bn"):
            compress_head(nn.Sequential(make_head(4, 6, 6, projection=projection)), loader, dim=2)
    with pytest.raises(ArgumentError, match="bare head"):
        compress_head(make_head(4, 6, 4), loader, dim=2)
    for call in (refit_head, lambda model, loader: compress_head(model, loader, dim=2)):
        with pytest.raises(HeadNotFoundError, match="convert_model"):
            call(nn.Linear(6, 4), loader)


# Several processes


def fit_on_rank(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = small_model(bank="simplex")
    features, labels = overlapping()
    # Unequal shares, labels that only the first rank has, and a rank that has no data at all.
    mine = {0: labels < 2, 1: labels >= 2, 2: labels < 0}[rank] if world_size > 1 else labels >= 0
    loader = batched(features[mine], labels[mine], size=20) if mine.any() else []
    fits = [refit_head(model, loader, iterations=5), compress_head(model, loader, dim=3, iterations=5)]
    report = torch.tensor([[fit.accuracy, fit.similarity, fit.num_samples] for fit in fits])
    return {**model.state_dict(), "report": report}


def test_ranks_agree_bit_for_bit_and_with_one_process():
    first, *others = run_on_ranks(fit_on_rank, 3, 3)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert not dist.is_initialized()
    alone = fit_on_rank(0, 1)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=5e-3, rtol=5e-3)


def fit_after_training_on_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    features, labels = overlapping()
    states = []
    for fit in (fit_head, refit_head, lambda model, loader: compress_head(model, loader, dim=3)):
        model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 6))
        convert_model(model, dim=6, bank="simplex", classifier="1")
        wrapped = nn.parallel.DistributedDataParallel(model)
        mine = slice(rank, None, 2)
        wrapped(features[mine] * (1 + rank))  # from here on each rank has running statistics of its own
        model[0].assigner = DynamicAssigner(model)
        model[0].assigner.class_means.fill_(rank)
        fit(model, batched(features[mine], labels[mine]))
        states.append(dict(model.state_dict()))
    return states


def test_ranks_whose_running_statistics_differ_fit_the_model_of_the_first():
    for first, second in zip(*run_on_ranks(fit_after_training_on_rank, 2), strict=True):
        for name, value in first.items():
            if name == "0.assigner.class_means":  # of each rank's own data
                assert value.unique().tolist() == [0.0]
                assert second[name].unique().tolist() == [1.0]
            else:
                assert torch.equal(value, second[name]), name


# Never worse without a word


def separable(projection: str = "linear+bn", width: int = 16) -> tuple[HypersphericalHead, torch.Tensor, torch.Tensor]:
    features, labels = clouds(5, width, apart=5.0)
    return make_head(5, width, 4, projection=projection, bank="simplex"), features, labels


@pytest.mark.parametrize("projection", in_front(["linear", "linear+bn"], "linear+bn"))
@given(seed=SEEDS, shift=st.sampled_from([0.0, 10.0, 3000.0]), exponent=st.integers(-30, 12))
@settings(max_examples=15)
def test_a_refit_tells_apart_what_can_be_wherever_it_lies_or_is_refused(projection, seed, shift, exponent):
    head, features, labels = separable(projection)
    features = 10.0**exponent * (features + shift * normal(16, seed=seed))
    try:
        fit = refit_head(head, batched(features, labels), iterations=20)
    except ArgumentError:
        return
    assert all(torch.isfinite(value).all() for value in head.state_dict().values())
    # Without an intercept only directions count, and far from zero these are all alike.
    assert fit.accuracy == 1.0 or (projection == "linear" and shift == 3000.0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("compress", [False, True])
def test_what_comes_out_of_lbfgs_worse_is_not_written(compress, broken, monkeypatch):
    def spoil(self, loss, parameters, **options):
        with torch.no_grad():
            for each in parameters:
                each.fill_(broken)

    head, features, labels = separable()
    model = nn.Sequential(head)
    fit_head(model, batched(features, labels))
    monkeypatch.setattr(Samples, "descend", spoil)
    before = copy.deepcopy(head.state_dict())
    if compress:
        fit = compress_head(model, batched(features, labels), dim=4)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    else:
        fit = refit_head(model, batched(features, labels))
        assert_same_state(head, before)
    assert fit.accuracy == 1.0
    assert not fit.held_out.is_better
    assert "what there was stays" in str(fit)


@pytest.mark.parametrize("compress", [False, True])
def test_fits_work_in_inference_mode(compress):
    head, features, labels = separable()
    model = nn.Sequential(head)
    with torch.inference_mode():
        refit = (
            compress_head(model, [(features, labels)], dim=4) if compress else refit_head(model, [(features, labels)])
        )
    assert refit.accuracy == 1.0
    assert not any(value.is_inference() for value in model.state_dict().values())


@pytest.mark.parametrize("options", [{"scale": "16"}, {"iterations": "5"}, {"iterations": 2.5}])
def test_options_of_another_type(options):
    head, features, labels = separable()
    model = nn.Sequential(head)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        refit_head(model, batched(features, labels), **options)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        compress_head(model, batched(features, labels), dim=2, **options)
    with pytest.raises(ArgumentError, match="dim to be a whole number"):
        compress_head(model, batched(features, labels), dim=5 / 2)
