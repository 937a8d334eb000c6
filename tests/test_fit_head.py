"""A start from the data: what it must not depend on, what it must reach, and what it leaves alone."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from clouds import Batches, assert_same_state, batched, clouds, make_head, normal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from hyperproto import (
    ArgumentError,
    AssignmentError,
    BankError,
    HeadNotFoundError,
    HypersphericalHead,
    LabelError,
    PrototypeBank,
    ShapeError,
    convert_model,
    fit_head,
    get_heads,
)
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.fitting import compress_head as compressing
from hyperproto.fitting import fit_head as module
from hyperproto.fitting.hand_over import start_with_free_vectors
from hyperproto.fitting.statistics import FeatureSample, FeatureStatistics, shrunk_covariance
from hyperproto.sphere import normalise
from hyperproto.testing import SEEDS, check_assignment


def predictions(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    return head(features).argmax(dim=1)


# What it reaches


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
@given(seed=SEEDS, num_classes=st.integers(2, 8), extra=st.integers(-1, 3))
@settings(max_examples=15)
def test_separated_classes_are_told_apart_where_the_dimension_allows_it(projection, seed, num_classes, extra):
    dim = max(2, num_classes + extra)
    head = make_head(num_classes, 24, dim, projection=projection, bank="auto")
    features, labels = clouds(num_classes, 24, apart=10.0, seed=seed)
    fit = fit_head(head, batched(features, labels))
    assert fit.accuracy == 1.0
    assert fit.similarity > 0.99
    assert (fit.num_samples, fit.unseen) == (len(labels), ())
    assert torch.equal(predictions(head, features), labels)
    check_assignment(head)


@pytest.mark.parametrize("dim", [2, 3, 5, 20])
@pytest.mark.parametrize("width", [4, 32])
def test_a_start_beats_no_start(dim, width):
    features, labels = clouds(12, width)
    fitted = make_head(12, width, dim, bank="auto")
    cold = float((predictions(fitted, features) == labels).float().mean())
    fit = fit_head(fitted, batched(features, labels))
    assert fit.accuracy > cold + 0.2
    assert fit.accuracy == pytest.approx(float((predictions(fitted, features) == labels).float().mean()))


def test_the_assignment_follows_the_data():
    # Classes on a circle, in a random order: neighbours on the circle must get neighbouring prototypes.
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    angles = 2 * np.pi * order / 10
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.arange(10).repeat(40)
    features = circle[labels] @ normal(2, 16) + 0.05 * normal(400, 16, seed=1)
    bank = PrototypeBank.from_tensor(circle[torch.randperm(10, generator=torch.Generator().manual_seed(4))])
    head = make_head(10, 16, 2, bank=bank)
    assert fit_head(head, batched(features, labels)).accuracy == 1.0
    own = head.class_prototypes[order.argsort()]  # in the order of the circle
    steps = (own * own.roll(1, dims=0)).sum(dim=1)
    torch.testing.assert_close(steps, torch.full((10,), float(np.cos(2 * np.pi / 10))))


def reference_regression(
    features: torch.Tensor, labels: torch.Tensor, targets: np.ndarray, *, intercept: bool
) -> np.ndarray:
    """Predictions (N, D) of least squares with a ridge, by NumPy's lstsq on rows whose squares add up to the problem.

    A row for each class mean, a shorter one for each sample's distance from it, and the ridge.
    """
    x, y = features.double().numpy(), labels.numpy()
    count, width = x.shape
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(axis=0) for c in classes])
    rest = x - means[np.searchsorted(classes, y)]
    share = oracle_shrinkage(rest.T @ rest / count, count - len(classes))
    ridge = (share * (rest**2).sum() + 1e-8 * ((x - x.mean(axis=0)) ** 2).sum()) / (count * width)
    aims = targets[classes]
    centre, aim = (means.mean(axis=0), aims.mean(axis=0)) if intercept else (np.zeros(width), np.zeros(aims.shape[1]))
    rows = np.concatenate(
        [
            (means - centre) / np.sqrt(len(classes)),
            np.sqrt((1 - share) / count) * rest,
            np.sqrt(ridge) * np.eye(width),
        ]
    )
    aims = np.concatenate([(aims - aim) / np.sqrt(len(classes)), np.zeros((count + width, aims.shape[1]))])
    return (x - centre) @ np.linalg.lstsq(rows, aims, rcond=None)[0] + aim


def oracle_shrinkage(covariance: np.ndarray, n: int) -> float:
    p = len(covariance)
    eigenvalues = np.linalg.eigvalsh(covariance)
    first, second = eigenvalues.sum(), (eigenvalues**2).sum()
    return min(1.0, ((1 - 2 / p) * second + first**2) / ((n + 1 - 2 / p) * (second - first**2 / p)))


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
@given(seed=SEEDS, dim=st.integers(2, 9), width=st.integers(2, 40), per_class=st.integers(2, 30))
@settings(max_examples=20)
def test_the_head_is_the_ridge_regression_on_its_assignment(projection, seed, dim, width, per_class):
    features, labels = clouds(6, width, per_class=per_class, seed=seed)
    kept = torch.arange(len(labels)) % 12 != 0  # half as many samples of the first class
    features, labels = features[kept], labels[kept]
    head = make_head(6, width, dim, projection=projection)
    fit_head(head, batched(features, labels))
    prototypes = head.class_prototypes.double().numpy()
    expected = reference_regression(features, labels, prototypes, intercept=projection == "linear+bn")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(head.embed(features).numpy(force=True), expected, atol=2e-3)


def test_rare_labels_count_as_much_as_frequent_ones():
    features, labels = clouds(10, 12, apart=1.0, per_class=400)
    left_out = (labels >= 5) & (torch.arange(len(labels)) % 500 >= 10)  # all but 8 of 400
    head = make_head(10, 12, 9, bank="auto")
    fit_head(head, batched(features[~left_out], labels[~left_out]))
    right = (predictions(head, features) == labels).float()
    assert abs(float(right[labels < 5].mean() - right[labels >= 5].mean())) < 0.15


def test_train_mode_starts_from_the_same_function():
    features, labels = clouds(10, 32)
    features, labels = features[labels % 3 != 0], labels[labels % 3 != 0]
    features, labels = torch.cat([features, features[:7]]), torch.cat([labels, labels[:7]])
    head = make_head(10, 32, 6)
    fit_head(head, batched(features, labels))
    evaluated = head.embed(features)
    torch.testing.assert_close(head.train().embed(features), evaluated, atol=1e-4, rtol=0)
    torch.testing.assert_close(head.eval().embed(features), evaluated, atol=1e-2, rtol=0)  # statistics moved a little


def test_without_a_projection_only_the_assignment_is_chosen():
    head = make_head(8, 5, 5, projection="none")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8).repeat(20)
    lengths = torch.linspace(0.1, 10.0, 160)[:, None]
    features = lengths * (head.bank.prototypes[order][labels] + 0.02 * normal(160, 5))
    features[:8] = -1e4 * features[:8]  # long and wrong; only directions count
    before = copy.deepcopy(head.state_dict())
    fit = fit_head(head, batched(features, labels))
    assert torch.equal(head.assignment, order)
    assert fit.accuracy == 152 / 160
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"assignment", "assignment_record", "format_version"}


# What it must not depend on


@given(seed=SEEDS, exponent=st.integers(-12, 12))
@settings(max_examples=15)
def test_turning_and_scaling_the_features_changes_no_prediction(seed, exponent):
    features, labels = clouds(8, 12, seed=seed)
    rotation = torch.linalg.qr(normal(12, 12, seed=seed).double()).Q.float()
    turned = 2.0**exponent * features @ rotation
    plain, other = make_head(8, 12, 4), make_head(8, 12, 4)
    fit_head(plain, batched(features, labels))
    fit_head(other, batched(turned, labels))
    assert torch.equal(plain.assignment, other.assignment)
    torch.testing.assert_close(other.embed(turned), plain.embed(features), atol=1e-3, rtol=0)


@given(seed=SEEDS)
@settings(max_examples=15)
def test_renaming_the_labels_renames_the_predictions(seed):
    features, labels = clouds(8, 12, seed=seed)
    names = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    plain, renamed = make_head(8, 12, 4), make_head(8, 12, 4)
    first = fit_head(plain, batched(features, labels))
    second = fit_head(renamed, batched(features, names[labels]))
    assert torch.equal(renamed.assignment[names], plain.assignment)
    assert torch.equal(predictions(renamed, features), names[predictions(plain, features)])
    assert (second.accuracy, second.similarity) == (first.accuracy, pytest.approx(first.similarity))


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 60), max_size=8))
@settings(max_examples=15)
def test_batches_and_their_order_do_not_matter(seed, sizes):
    features, labels = clouds(6, 10, seed=seed)
    whole, parts = make_head(6, 10, 4), make_head(6, 10, 4)
    first = fit_head(whole, [(features, labels)])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cuts = torch.tensor(sizes, dtype=torch.int64).cumsum(0).clamp(max=len(labels)).tolist()
    split = zip(features[order].tensor_split(cuts), labels[order].tensor_split(cuts), strict=True)
    second = fit_head(parts, list(split))
    assert_same_state(parts, whole, atol=1e-5, rtol=1e-4)
    assert (second.accuracy, second.num_samples) == (first.accuracy, first.num_samples)


def test_soft_targets_weigh_as_samples_do():
    features, labels = clouds(5, 8)
    hard, soft = make_head(5, 8, 3), make_head(5, 8, 3)
    fit_head(hard, batched(features, labels))
    fit_head(soft, batched(features, one_hot(labels, 5).float()))
    assert_same_state(soft, hard, atol=1e-6, rtol=1e-5)

    other = labels.roll(7)
    mixed, repeated = FeatureStatistics(5, 8), FeatureStatistics(5, 8)
    mixed.add(features, 1.5 * one_hot(labels, 5) + 0.5 * one_hot(other, 5))
    repeated.add(features.repeat(4, 1), torch.cat([labels, labels, labels, other]))
    for one, four in zip(mixed.tensors(), repeated.tensors(), strict=True):
        torch.testing.assert_close(2.0 * one, four)


def test_nothing_but_the_head_changes_and_no_global_randomness_is_used():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), make_head(4, 16, 3))
    model[2].eval()
    features, labels = clouds(4, 6)
    loader = DataLoader(TensorDataset(features, labels), batch_size=32, shuffle=True)
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    state = torch.get_rng_state()
    fit = fit_head(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in model.modules()] == modes
    assert not model[3].projection._forward_pre_hooks
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {name for name in before if name.startswith(("3.projection", "3.assignment", "3.format"))}
    assert "3.projection.0.weight" in changed
    again = copy.deepcopy(model)
    again.load_state_dict(before)
    torch.manual_seed(99)
    assert fit_head(again, loader).num_samples == fit.num_samples
    assert_same_state(again, model, atol=1e-5, rtol=1e-4)


def test_parameters_stay_the_same_objects():
    head = make_head(4, 8, 3)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    fit_head(head, batched(*clouds(4, 8)))
    before = head.projection[0].weight.clone()
    nn.functional.cross_entropy(head.train()(normal(20, 8)), torch.arange(20) % 4).backward()
    optimizer.step()
    assert not torch.equal(head.projection[0].weight, before)
    assert torch.isfinite(head.projection[0].weight).all()


# Where features come from


def images(num: int, size: int = 64) -> Batches:
    """Pictures of one colour a class, the classes unequal in brightness."""
    labels = torch.arange(num) % 6
    colours = normal(6, 3)
    return batched(colours[labels][:, :, None, None] + 0.1 * normal(num, 3, size, size), labels, size=12)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_efficientnet", "deit_tiny_distilled_patch16_224", "convnext_atto"]
)
def test_models_of_timm(name):
    import timm  # here, so that the processes started below need not wait for it

    options = {"img_size": 64} if "deit" in name else {}
    model = timm.create_model(name, num_classes=6, **options)
    convert_model(model, dim=4)
    data = images(36, 160 if "vit" in name and "deit" not in name else 64)
    fit = fit_head(model, data)
    heads = list(get_heads(model).values())
    assert all(torch.equal(head.assignment, heads[0].assignment) for head in heads)
    with torch.no_grad():
        found = torch.cat([model.eval()(inputs).argmax(dim=1) for inputs, _ in data])
    accuracy = float((found == torch.cat([labels for _, labels in data])).float().mean())
    assert accuracy > 0.9
    if len(heads) == 1:
        assert fit.accuracy == pytest.approx(accuracy, abs=0.03)
    else:
        weights = [head.projection[0].weight for head in heads]
        assert not torch.equal(*weights)


def test_channels_first_and_tokens_are_rows():
    features, labels = clouds(5, 8, per_class=24)
    plain, tokens, maps = make_head(5, 8, 4), make_head(5, 8, 4), make_head(5, 8, 4)
    maps = ChannelsFirstHead(8, 5, dim=4, bank="random").eval()
    # Four rows of one label make one sample with four positions.
    order = labels.argsort(stable=True)
    features, labels = features[order], labels[order]
    fit_head(plain, batched(features, labels))
    fit = fit_head(tokens, [(features.view(30, 4, 8), labels[::4])])
    assert fit.num_samples == 30
    fit_head(maps, [(features.view(30, 2, 2, 8).permute(0, 3, 1, 2), labels[::4])])
    assert_same_state(tokens, plain, atol=1e-5, rtol=1e-4)
    assert_same_state(maps, plain, atol=1e-5, rtol=1e-4)


def test_a_wrapped_model_is_fitted_like_the_bare_one():
    features, labels = clouds(4, 6)
    bare = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), make_head(4, 12, 3))
    compiled = torch.compile(copy.deepcopy(bare), backend="eager")
    in_place = copy.deepcopy(bare)
    in_place.compile(backend="eager")
    with torch.no_grad():
        for model in (compiled, in_place):
            model.eval()(features[:50])  # compiled as it is going to be run, but before there are hooks
    replicated = nn.DataParallel(copy.deepcopy(bare))
    fits = [fit_head(model, batched(features, labels)) for model in (bare, compiled, in_place, replicated)]
    assert fits[1:] == fits[:1] * 3
    for model in (compiled._orig_mod, in_place, replicated.module):
        assert_same_state(model, bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    features, labels = clouds(6, 16, apart=6.0)
    head = make_head(6, 16, 5).to(dtype)
    fit = fit_head(head, batched(features.to(dtype), labels))
    assert head.projection[0].weight.dtype == dtype
    assert head.projection[1].weight.dtype == torch.float32
    assert fit.accuracy > 0.95
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fit_head(make_head(6, 16, 5), batched(features, labels)).accuracy > 0.95


def test_a_generator_is_enough():
    def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor, str]]:
        for inputs, labels in batched(*clouds(4, 6)):
            yield inputs, labels, "more"

    assert fit_head(make_head(4, 6, 3), stream()).num_samples == 120


# Little data, odd data


@pytest.mark.parametrize("per_class", [1, 2, 5])
@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_more_features_than_samples(per_class, projection):
    train, labels = clouds(6, 200, apart=1.0, per_class=20)
    head = make_head(6, 200, 5, projection=projection, bank="auto")
    fit_head(head, [(train[: 6 * per_class], labels[: 6 * per_class])])
    rest = slice(6 * per_class, None)
    assert float((predictions(head, train[rest]) == labels[rest]).float().mean()) > 0.9


def test_features_that_are_constant_or_copies_of_others():
    features, labels = clouds(5, 6, apart=10.0)
    padded = torch.cat([features, torch.zeros(150, 2), torch.ones(150, 1), features], dim=1)
    head = make_head(5, 15, 4, bank="auto")
    assert fit_head(head, batched(padded, labels)).accuracy == 1.0
    assert torch.isfinite(head.projection[0].weight).all()


def test_a_label_without_samples_keeps_its_prototype_if_nobody_needs_it():
    features, labels = clouds(6, 12)
    present = labels < 4
    roomy = make_head(6, 12, 5, bank=PrototypeBank(6, 5))
    order = torch.tensor([5, 0, 4, 2, 1, 3])
    roomy.assign_(order)
    fit = fit_head(roomy, [(features[present], labels[present])])
    assert fit.unseen == (4, 5)
    assert str(fit).endswith("2 labels not seen")
    assert fit.accuracy == 1.0
    check_assignment(roomy)
    free = set(range(6)) - set(roomy.assignment[:4].tolist())
    for label in (4, 5):
        if int(order[label]) in free:
            assert int(roomy.assignment[label]) == int(order[label])

    spare = make_head(4, 12, 5, bank=PrototypeBank(9, 5, method="random"))
    assert fit_head(spare, [(features[present], labels[present])]).accuracy == 1.0
    check_assignment(spare)


@settings(max_examples=20)
@given(seed=SEEDS, num_unseen=st.integers(1, 3))
def test_on_a_simplex_no_label_has_to_give_its_prototype_up(seed, num_unseen):
    """All choices of as many corners are congruent."""
    features, labels = clouds(6, 12, seed=seed)
    present = labels >= num_unseen
    head = make_head(6, 12, 5, bank=PrototypeBank(6, 5))
    head.assign_(torch.randperm(6, generator=torch.Generator().manual_seed(seed)))
    before = head.assignment.clone()
    assert fit_head(head, [(features[present], labels[present])]).accuracy == 1.0
    assert torch.equal(head.assignment[:num_unseen], before[:num_unseen])


def test_a_loader_may_reuse_its_buffer():
    features, labels = clouds(6, 12)
    buffer = torch.empty(20, 12)

    def loader():
        for rows, own in batched(features, labels, size=20):
            yield buffer.copy_(rows), own

    once, reused = make_head(6, 12, 5), make_head(6, 12, 5)
    expected = fit_head(once, batched(features, labels, size=20))
    assert fit_head(reused, loader()) == expected


def test_the_sample_does_not_keep_all_tokens():
    sample = FeatureSample(8, width=4)
    sample.add(torch.randn(8, 9, 4)[:, 0], torch.arange(8))
    rows = sample._held[-1][1]
    assert rows.untyped_storage().nbytes() == rows.nbytes


def test_accuracy_is_measured_on_a_bounded_sample(monkeypatch):
    features, labels = clouds(6, 10, apart=0.7, per_class=400)
    whole, bounded = make_head(6, 10, 4), make_head(6, 10, 4)
    expected = fit_head(whole, batched(features, labels)).accuracy
    monkeypatch.setattr(module, "KEPT_NUMBERS", 10 * 600)
    fit = fit_head(bounded, batched(features, labels))
    assert_same_state(bounded, whole)
    assert fit.num_samples == 2400
    assert fit.accuracy * 600 == pytest.approx(round(fit.accuracy * 600))
    assert fit.accuracy == pytest.approx(expected, abs=4 * (0.25 / 600) ** 0.5)


@given(sizes=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(1, 10))
def test_a_sample_has_rows_once_and_no_more_than_asked_for(sizes, limit):
    sample = FeatureSample(limit, width=1)
    for part in torch.arange(sum(sizes)).split(sizes):
        sample.add(part[:, None].float(), part)
    rows, labels = sample.draw()
    assert len(labels) == len(labels.unique()) == min(limit, sum(sizes))
    assert torch.equal(rows[:, 0].long(), labels)


def test_a_sample_does_not_depend_on_what_was_drawn_before():
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sample = FeatureSample(10, width=1)
        sample.add(torch.arange(100.0)[:, None], torch.arange(100))
        drawn.append(sample.draw()[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn)


def test_every_row_of_a_stream_is_as_likely():
    sample = FeatureSample(1000, width=1)
    for part in torch.arange(10_000).split(64):
        sample.add(part[:, None].float(), part)
    counts = torch.bincount(sample.draw()[1] // 1000, minlength=10)
    assert float(((counts - 100.0) ** 2 / 100.0).sum()) < 27.9  # chi-squared, 9 degrees of freedom, 1 in 1000


@given(seed=SEEDS, width=st.integers(2, 12), num=st.integers(2, 60))
def test_the_shrinkage_is_the_published_one(seed, width, num):
    rows = normal(num, width, seed=seed).double()
    covariance = rows.T @ rows / num
    share = oracle_shrinkage(covariance.numpy(), num)
    expected = (1 - share) * covariance.numpy() + share * np.trace(covariance.numpy()) / width * np.eye(width)
    np.testing.assert_allclose(shrunk_covariance(covariance, num).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("length", [0.0, 2.0])
def test_a_round_covariance_is_left_as_it_is(length):
    covariance = length * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(shrunk_covariance(covariance, 5.0), covariance, rtol=1e-12, atol=0)


def test_statistics_far_from_zero_are_exact_enough():
    features, labels = clouds(4, 6)
    near, far = FeatureStatistics(4, 6), FeatureStatistics(4, 6)
    near.add(features.double(), labels)
    far.add(features.double() + 1e4, labels)
    torch.testing.assert_close(far.scatter().within, near.scatter().within, atol=1e-6, rtol=0)


@given(
    seed=SEEDS,
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    factor=st.sampled_from([1e-4, 1e-2, 1.0]),
    offset=st.sampled_from([0.0, 1e2, 1e3, 1e4]),
)
def test_classes_of_little_spread_far_from_zero_are_told_apart(seed, spread, factor, offset):
    means = normal(6, 12, seed=seed)
    labels = torch.arange(6).repeat(10)
    features = factor * (30.0 * means[labels] + spread * normal(60, 12, seed=seed + 1)) + offset
    assume(torch.pdist(features[:6]).min() > 1e-5 * features.norm(dim=1).mean())  # as float32 tells them
    assert fit_head(make_head(6, 12, 5), batched(features, labels)).accuracy == 1.0


def test_features_whose_spread_is_lost_in_rounding_are_refused():
    labels = torch.arange(6).repeat(100)
    head = make_head(6, 200, 5)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ArgumentError, match="so far from zero that rounding hides"):
        fit_head(head, batched(1e4 + 3.0 * normal(6, 200)[labels], labels))
    assert_same_state(head, before)


# The numbers written into the projection


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
@pytest.mark.parametrize("dim", [2, 4, 9])
def test_a_fitted_projection_is_as_long_as_a_fresh_one(projection, dim):
    head = make_head(6, 12, dim, projection=projection)
    features, labels = clouds(6, 12)
    fit_head(head, batched(100.0 * features, labels))
    linear = head.projection if projection == "linear" else head.projection[0]
    # Rows of a fresh map have entries uniform in +-1 / sqrt(12): D rows of squared length 1 / 3.
    assert float(linear.weight.detach().norm()) == pytest.approx((dim / 3) ** 0.5, rel=1e-5)
    if projection == "linear+bn":
        assert float(head.projection[1].weight.detach().square().mean().sqrt()) == pytest.approx(1.0, rel=1e-4)


def test_running_statistics_are_those_of_the_weight_as_it_is_rounded():
    head = make_head(6, 12, 4).to(torch.bfloat16)
    features, labels = clouds(6, 12)
    fit_head(head, batched(10.0 + features, labels))
    projected = (10.0 + features).double() @ head.projection[0].weight.double().T
    mean, variance = projected.mean(dim=0), projected.var(dim=0, correction=0)
    torch.testing.assert_close(head.projection[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.projection[1].running_var.double(), variance, rtol=1e-5, atol=1e-5)


def test_accuracy_with_soft_targets_is_that_of_their_largest_entry():
    features, labels = clouds(6, 12, apart=0.7)
    hard, soft = make_head(6, 12, 4), make_head(6, 12, 4)
    expected = fit_head(hard, batched(features, labels))
    fit = fit_head(soft, batched(features, one_hot(labels, 6).float()))
    assert 0.4 < expected.accuracy < 1.0
    assert fit.accuracy == expected.accuracy
    assert_same_state(soft, hard, atol=1e-6, rtol=1e-6)


def test_the_similarity_of_soft_targets_is_that_of_weighted_means():
    features, labels = clouds(6, 12)
    target = 0.7 * one_hot(labels, 6).float() + 0.3 * one_hot((labels + 1) % 6, 6).float()
    head = make_head(6, 12, 4)
    fit = fit_head(head, batched(features, target))
    means = (target.T @ features) / target.sum(dim=0)[:, None]
    expected = (head.embed(means).detach() * head.class_prototypes).sum(dim=1).mean()
    assert fit.similarity == pytest.approx(float(expected), abs=1e-5)


def test_means_apart_by_rounding_tell_no_labels_apart():
    labels = torch.arange(60) % 4
    features = normal(15, 6).repeat_interleave(4, dim=0)  # of each label the same
    head = make_head(4, 6, 3)
    features[:, 0] = 1e-8 * labels
    with pytest.raises(ArgumentError, match="same mean for all labels"):
        fit_head(head, batched(features, labels))
    features[:, 0] = 1e-4 * labels
    assert fit_head(head, batched(features, labels)).similarity > 0.5


def test_a_sample_holds_no_more_than_twice_its_limit():
    sample = FeatureSample(20, width=1)
    for part in torch.arange(3000.0)[:, None].split(7):
        sample.add(part, part[:, 0].long())
        assert sum(len(labels) for _, _, labels in sample._held) <= 2 * 20


# Errors


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ArgumentError, "no samples"),
        ([(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))], ArgumentError, "no samples"),
        ([(normal(8, 6), torch.tensor([0, 1, 2, 4] * 2))], LabelError, "from 0 to 4"),
        ([(normal(8, 6), torch.arange(8) % 4), (normal(8, 6), torch.zeros(8, 3))], LabelError, r"\(B, 4\)"),
        ([(normal(8, 6), torch.arange(7) % 4)], ShapeError, "8 samples"),
        ([(normal(8, 5), torch.arange(8) % 4)], ShapeError, r"\(8, 5\)"),
        ([(torch.full((8, 6), torch.nan), torch.arange(8) % 4)], ArgumentError, "finite"),
        ([(torch.full((8, 6), torch.inf), torch.arange(8) % 4)], ArgumentError, "finite"),
        ([(torch.ones(8, 6), torch.arange(8) % 4)], ArgumentError, "nothing to fit"),
        ([(normal(8, 6), torch.full((8,), 2))], ArgumentError, "several labels"),
    ],
)
def test_errors_leave_the_model_as_it_was(data, error, words):
    model = nn.Sequential(nn.Identity(), make_head(4, 6, 3))
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        fit_head(model, data)
    assert_same_state(model, before)
    assert all(each.training for each in model.modules())
    assert not model[1].projection._forward_pre_hooks


def test_a_model_without_a_head_or_that_does_not_call_it():
    with pytest.raises(HeadNotFoundError, match="convert_model"):
        fit_head(nn.Linear(6, 4), batched(*clouds(4, 6)))
    idle = nn.Linear(6, 4)
    idle.head = make_head(4, 6, 3)
    with pytest.raises(HeadNotFoundError, match="does not call"):
        fit_head(idle, batched(*clouds(4, 6)))


def test_without_a_projection_features_must_be_finite_too():
    head = make_head(4, 6, 6, projection="none")
    features, labels = clouds(4, 6)
    features[2, 3] = torch.nan
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(AssignmentError, match=r"rows \[2\]"):
        fit_head(head, batched(features, labels))
    assert_same_state(head, before)


def test_heads_of_different_banks_are_refused():
    pair = nn.ModuleList([make_head(4, 6, 3), make_head(4, 6, 3, seed=1)])
    with pytest.raises(BankError, match="share one bank"):
        fit_head(pair, [])


def test_one_head_in_error_leaves_the_others_too():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = make_head(4, 6, 3)
            self.second = HypersphericalHead(6, 4, bank=self.first.bank)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return (self.first(features) + self.second(0.0 * features)) / 2

    model = Pair()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="nothing to fit"):
        fit_head(model, batched(*clouds(4, 6)))
    assert_same_state(model, before)


# Several processes


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), make_head(6, 16, 4))


def fit_on_rank(rank: int) -> tuple[dict[str, torch.Tensor], float, float, int]:
    model = nn.parallel.DistributedDataParallel(make_model())
    features, labels = clouds(6, 8)
    # Unequal shares, and labels that only one rank has.
    mine = labels < 2 if rank == 0 else labels >= 2
    fit = fit_head(model, batched(features[mine], labels[mine], size=20))
    assert fit.unseen == ()
    return model.module.state_dict(), fit.similarity, fit.accuracy, fit.num_samples


def test_ranks_agree_bit_for_bit_and_with_one_process():
    (first, *first_fit), (second, *second_fit) = run_on_ranks(fit_on_rank, 2)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert first_fit == second_fit
    alone = make_model()
    fit = fit_head(alone, batched(*clouds(6, 8)))
    assert_same_state(alone, first, atol=1e-5, rtol=1e-4)
    assert [fit.accuracy, fit.num_samples] == first_fit[1:]


# A few large features


@pytest.mark.parametrize("turned", [False, True])
@given(seed=SEEDS, factor=st.sampled_from([1.0, 1e2, 1e3, 1e4]))
@settings(max_examples=10)
def test_one_large_feature_does_not_blind_a_fit(turned, seed, factor):
    features, labels = clouds(5, 16, apart=4.0, per_class=40, seed=seed)
    features[:, 3] *= factor
    if turned:  # not along an axis
        features = features @ torch.linalg.qr(normal(16, 16, seed=seed).double()).Q.float()
    assert fit_head(make_head(5, 16, 4, bank="simplex"), batched(features, labels)).accuracy > 0.95


def test_one_large_sample_does_not_blind_a_fit():
    features, labels = clouds(5, 16, apart=4.0, per_class=40)
    features[7] *= 1e4
    assert fit_head(make_head(5, 16, 4, bank="simplex"), batched(features, labels)).accuracy > 0.95


# Prototypes from the data


def test_class_vectors_beat_prototypes_that_know_nothing_of_the_classes():
    features, labels = clouds(20, 32, apart=1.0, per_class=120)
    seen, unseen = slice(0, 800), slice(800, None)
    accuracies = {}
    for bank in (None, "class-vectors"):
        model = nn.Sequential(make_head(20, 32, 4, bank="auto"))
        old = model[0]
        fit = fit_head(model, batched(features[seen], labels[seen]), bank=bank)
        accuracies[bank] = float((predictions(model, features[unseen]) == labels[unseen]).float().mean())
        assert (model[0] is old) == (bank is None)
        assert (model[0].dim, model[0].num_classes) == (4, 20)
        check_assignment(model[0])
        assert fit.accuracy == pytest.approx(
            float((predictions(model, features[seen]) == labels[seen]).float().mean()), abs=1e-6
        )
    assert accuracies["class-vectors"] > accuracies[None]
    assert fit.held_out.is_better


def test_more_dimensions_than_labels_take_class_vectors_too():
    features, labels = clouds(4, 12, per_class=60)
    model = nn.Sequential(make_head(4, 12, 9))
    assert fit_head(model, batched(features, labels), bank="class-vectors").accuracy > 0.95
    assert model[0].dim == 9


def test_class_vectors_leave_the_directions_of_the_teacher_that_they_start_from(monkeypatch):
    features, labels = clouds(6, 12, per_class=30)
    begun = []

    def start(*args, **options):
        begun.append(start_with_free_vectors(*args, **options))
        return begun[-1]

    monkeypatch.setattr(compressing, "start_with_free_vectors", start)
    model = nn.Sequential(make_head(6, 12, 3))
    fit_head(model, batched(features, labels), bank="class-vectors")
    first = normalise(begun[-1].vectors)
    assert float((model[0].bank.prototypes - first).abs().max()) > 0.01


def test_a_bank_of_another_name_or_for_a_bare_head_is_refused():
    features, labels = clouds(4, 12)
    with pytest.raises(ArgumentError, match="bank must be one of 'class-vectors'"):
        fit_head(nn.Sequential(make_head(4, 12, 3)), [(features, labels)], bank="simplex")
    with pytest.raises(ArgumentError, match="bare head"):
        fit_head(make_head(4, 12, 3), [(features, labels)], bank="class-vectors")
    wrapped = nn.DataParallel(nn.Sequential(make_head(4, 12, 3)))
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(HeadNotFoundError, match=r" fit_head\(model, \.\.\.\), then"):
            fit_head(model, [(features, labels)], bank="class-vectors")
