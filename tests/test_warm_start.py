"""A start from a trained classifier: exact where D allows it, graceful below, never a guess."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

from hyperproto import ArgumentError, AssignmentError, HypersphericalHead, PrototypeBank, ShapeError, convert_model
from hyperproto.conversion.warm_start import warm_start_
from hyperproto.matching.procrustes import align
from hyperproto.matching.swaps import swap_to_agree
from hyperproto.testing import SEEDS, check_assignment

BANKS = {dim: PrototypeBank(12, dim) for dim in (3, 6, 8, 11)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(in_features: int, num_classes: int, seed: int = 0) -> nn.Linear:
    """A classifier whose biases matter, as after training on unequal classes."""
    classifier = nn.Linear(in_features, num_classes)
    with torch.no_grad():
        classifier.weight.copy_(normal(num_classes, in_features, seed=seed))
        classifier.bias.copy_(2 * normal(num_classes, seed=seed + 1))
    return classifier


def agreement(head: HypersphericalHead, classifier: nn.Linear, seed: int = 0, train: bool = False) -> float:
    features = normal(2000, head.in_features, seed=seed + 2)
    predicted = copy.deepcopy(head).train(train)(features).argmax(dim=1)
    return float((predicted == classifier(features).argmax(dim=1)).float().mean())


def unit_rows(num: int, dim: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(normal(num, dim, seed=seed).double())


# The projection


@pytest.mark.parametrize("extra", [-1, 0, 3])
@settings(max_examples=15)
@given(seed=SEEDS, num_classes=st.integers(3, 9), spare=st.integers(0, 3))
def test_the_ranking_is_reproduced_where_the_dimension_allows_it(extra, seed, num_classes, spare):
    dim = num_classes + extra
    bank = PrototypeBank(num_classes + spare, dim, method="random", seed=seed)
    head = HypersphericalHead(16, num_classes, bank=bank).eval()
    classifier = trained(16, num_classes, seed)
    assert warm_start_(head, classifier).reproduced == pytest.approx(1.0, abs=1e-6)
    check_assignment(head)
    assert agreement(head, classifier, seed) > 0.995  # rounding decides where the two best nearly tie


@pytest.mark.parametrize("dim", [11, 20])
def test_a_simplex_gives_the_old_logits_up_to_a_factor_and_a_shift_per_sample(dim):
    head, classifier = HypersphericalHead(16, 12, dim=dim).eval(), trained(16, 12)
    warm_start_(head, classifier)
    features = normal(50, 16)
    old, new = classifier(features).double(), head(features).double()
    old, new = (logits - logits.mean(dim=1, keepdim=True) for logits in (old, new))
    cosines = (old * new).sum(dim=1) / (old.norm(dim=1) * new.norm(dim=1))
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-5, rtol=0)


def test_agreement_falls_gracefully_with_the_dimension():
    found = []
    for dim in (11, 8, 6, 3):
        reached = []
        for seed in range(5):
            head, classifier = HypersphericalHead(32, 12, bank=BANKS[dim]).eval(), trained(32, 12, seed)
            part = warm_start_(head, classifier).reproduced
            reached.append((part, agreement(head, classifier, seed)))
        found.append(np.mean(reached, axis=0))
    parts, agreements = np.transpose(found)
    assert (np.diff(parts) < 0).all()
    assert (np.diff(agreements) < 0).all()
    assert agreements[0] > 0.995
    assert agreements[1] > 0.6  # D = 2/3 C
    assert agreements[3] > 2.5 / 12  # D = C/4: far above chance


@pytest.mark.parametrize(("num_classes", "dim"), [(20, 8), (50, 20), (100, 50)])
def test_a_classifier_of_low_rank_keeps_its_ranking_on_prototypes_from_its_own_vectors(num_classes, dim):
    for seed in range(3):
        classifier = nn.Linear(64, num_classes)
        classifier.load_state_dict(
            {
                "weight": normal(num_classes, dim, seed=seed) @ normal(dim, 64, seed=seed + 1),
                "bias": torch.zeros(num_classes),
            }
        )
        head = HypersphericalHead(64, num_classes, bank=PrototypeBank.from_class_vectors(classifier.weight, dim)).eval()
        other = HypersphericalHead(64, num_classes, dim=dim).eval()
        assert warm_start_(head, classifier).reproduced > 0.99 > 0.85 > warm_start_(other, classifier).reproduced
        assert torch.equal(head.assignment, torch.arange(num_classes))
        assert agreement(head, classifier, seed) > agreement(other, classifier, seed) + 0.3 > 0.6


@pytest.mark.parametrize("dim", [3, 6, 8, 11])
def test_a_warm_start_beats_a_cold_one(dim):
    warm, cold = [], []
    for seed in range(5):
        head, classifier = HypersphericalHead(32, 12, bank=BANKS[dim], seed=seed).eval(), trained(32, 12, seed)
        cold.append(agreement(head, classifier, seed))
        warm_start_(head, classifier)
        warm.append(agreement(head, classifier, seed))
    assert np.mean(warm) > np.mean(cold) + 0.1


def test_the_assignment_is_worth_more_than_a_random_one():
    head, chosen, given_one = HypersphericalHead(32, 12, bank=BANKS[6]), [], []
    for seed in range(5):
        classifier = trained(32, 12, seed)
        chosen.append(warm_start_(head, classifier).reproduced)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        given_one.append(warm_start_(head, classifier, assignment=order).reproduced)
        assert torch.equal(head.assignment, order)
    assert np.mean(chosen) > np.mean(given_one) + 0.05


def test_swaps_find_more_than_rotation_and_matching_alone():
    reached, bank = [], PrototypeBank(40, 20)
    for seed in range(3):
        classifier = trained(64, 40, seed)
        reached.append(warm_start_(HypersphericalHead(64, 40, bank=bank), classifier).reproduced)
    assert np.mean(reached) > 0.6  # the alternation by itself ends at 0.57 on such classifiers


def test_train_mode_starts_from_about_the_same_function():
    # Standard normal features, so that the old logits average to the bias: taken out, as it is over balanced data.
    head, classifier = HypersphericalHead(32, 12, dim=11), trained(32, 12)
    nn.init.zeros_(classifier.bias)
    warm_start_(head, classifier)
    assert agreement(head, classifier, train=True) > 0.9
    before = copy.deepcopy(head)
    for seed in range(30):
        head(normal(200, 32, seed=seed))
    # The statistics that batch norm finds do not undo the start.
    assert agreement(head, classifier) > 0.9
    assert agreement(before, classifier) > 0.995


def test_eval_mode_keeps_the_bias():
    classifier = trained(16, 12)
    with torch.no_grad():
        classifier.bias[3] += 100.0
    head = HypersphericalHead(16, 12, dim=11).eval()
    warm_start_(head, classifier)
    assert (head(normal(100, 16)).argmax(dim=1) == 3).all()


def test_a_linear_projection_reproduces_all_but_the_bias():
    head, classifier = HypersphericalHead(16, 12, dim=11, projection="linear").eval(), trained(16, 12)
    assert warm_start_(head, classifier).reproduced == pytest.approx(1.0, abs=1e-6)
    assert agreement(head, classifier) < 0.9
    nn.init.zeros_(classifier.bias)
    assert agreement(head, classifier) > 0.995


def test_without_a_projection_only_the_assignment_is_chosen():
    head = HypersphericalHead(6, 12, bank=BANKS[6], projection="none").eval()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    classifier = nn.Linear(6, 12, bias=False)
    with torch.no_grad():
        classifier.weight.copy_(3 * head.bank.prototypes[order])
    assert warm_start_(head, classifier).reproduced == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(head.assignment, order)
    assert agreement(head, classifier) > 0.995


def test_a_convolution_is_as_good_as_a_linear_layer():
    classifier = trained(16, 12)
    convolution = nn.Conv2d(16, 12, 1)
    with torch.no_grad():
        convolution.weight.copy_(classifier.weight[:, :, None, None])
        convolution.bias.copy_(classifier.bias)
    heads = [HypersphericalHead(16, 12, bank=BANKS[6]) for _ in range(2)]
    for head, source in zip(heads, (classifier, convolution), strict=True):
        warm_start_(head, source)
    for key, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    head, classifier = HypersphericalHead(16, 12, dim=11).to(dtype).eval(), trained(16, 12).to(dtype)
    warm_start_(head, classifier)
    assert head.projection[0].weight.dtype == dtype
    features = normal(500, 16).to(dtype)
    same = head(features).argmax(dim=1) == classifier(features).argmax(dim=1)
    assert float(same.float().mean()) > 0.9


def test_the_same_classifier_gives_the_same_head_and_no_global_randomness_is_used():
    classifier, heads = trained(16, 12), [HypersphericalHead(16, 12, bank=BANKS[6]) for _ in range(2)]
    state = torch.get_rng_state()
    warm_start_(heads[0], classifier)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    warm_start_(heads[1], classifier)
    for key, value in heads[0].state_dict().items():
        assert torch.equal(value, heads[1].state_dict()[key]), key


def alike(*size: int) -> nn.Linear:
    """A classifier as some models start theirs: with the same weights for all classes."""
    classifier = nn.Linear(*size)
    nn.init.zeros_(classifier.weight)
    return classifier


@pytest.mark.parametrize(
    ("classifier", "options", "error", "words"),
    [
        (alike(16, 12), {}, ArgumentError, "same weights for all classes"),
        (nn.Linear(15, 12), {}, ShapeError, r"\(12, 16\).*\(12, 15\)"),
        (nn.Linear(16, 11), {}, ShapeError, "number of classes"),
        (nn.Conv2d(16, 12, 3), {}, ShapeError, r"\(12, 16, 3, 3\)"),
        (nn.Linear(16, 12, device="meta"), {}, ArgumentError, "Load the weights"),
        (nn.Linear(16, 12), {"assignment": torch.zeros(12, dtype=torch.int64)}, AssignmentError, "more than once"),
    ],
)
def test_errors_leave_the_head_as_it_was(classifier, options, error, words):
    head = HypersphericalHead(16, 12, bank=BANKS[6])
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(error, match=words):
        warm_start_(head, classifier, **options)
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_classifier_that_is_not_finite_is_refused(part):
    classifier = trained(16, 12)
    with torch.no_grad():
        getattr(classifier, part)[3] = torch.nan
    with pytest.raises(ArgumentError, match="finite"):
        warm_start_(HypersphericalHead(16, 12, bank=BANKS[6]), classifier)


# The alignment


@given(seed=SEEDS, num=st.integers(2, 9), dim=st.integers(2, 6), width=st.integers(2, 9), spare=st.integers(0, 3))
def test_alignment_is_an_isometry_with_a_bijection_and_never_loses_similarity(seed, num, dim, width, spare):
    vectors, prototypes = normal(num, width, seed=seed).double(), unit_rows(num + spare, dim, seed + 1)
    found = align(vectors, prototypes, seed=seed)
    small = min(dim, width)
    gram = found.rotation @ found.rotation.T if dim <= width else found.rotation.T @ found.rotation
    torch.testing.assert_close(gram, torch.eye(small).double())
    assert len(set(found.assignment.tolist())) == num
    turned = vectors @ found.rotation.T
    reached = float((turned * prototypes[found.assignment]).sum())
    assert found.similarity == pytest.approx(reached, rel=1e-6)
    assert all(np.diff(found.similarities) >= -1e-9)
    # A fixed point: neither of the two steps can gain, by other solvers than those within.
    gains = (turned @ prototypes.T).numpy()
    assert gains[linear_sum_assignment(gains, maximize=True)].sum() == pytest.approx(reached, rel=1e-6)
    best = np.linalg.svd(prototypes[found.assignment].T.numpy() @ vectors.numpy(), compute_uv=False).sum()
    assert best == pytest.approx(reached, rel=1e-6)


@given(seed=SEEDS, num=st.integers(4, 9), dim=st.integers(2, 4))
def test_a_rotated_and_permuted_bank_is_recognised(seed, num, dim):
    prototypes = unit_rows(num, dim, seed)
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed + 1).double()).Q
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    found = align(prototypes[order] @ rotation, prototypes, num_starts=16)
    assert found.similarity > 0.9 * num  # a local optimum now and then


def test_swaps_end_where_vectors_and_prototypes_have_nothing_in_common():
    simplex = PrototypeBank(20, 19).prototypes.double()
    found = swap_to_agree(0.3 * torch.ones(20, 3, dtype=torch.float64), simplex, torch.arange(20))
    assert sorted(found.tolist()) == list(range(20))


@given(seed=SEEDS, num=st.integers(2, 8), dim=st.integers(2, 5))
def test_swaps_end_where_no_swap_gains(seed, num, dim):
    vectors, prototypes = normal(num, 4, seed=seed).double(), unit_rows(num + 2, dim, seed + 1)
    start = torch.randperm(num + 2, generator=torch.Generator().manual_seed(seed))[:num]
    before = start.clone()

    def agreement_of(order: torch.Tensor) -> float:
        return float(((vectors @ vectors.T) * (prototypes[order] @ prototypes[order].T)).sum())

    found = swap_to_agree(vectors, prototypes, start)
    assert torch.equal(start, before)
    assert sorted(found.tolist()) == sorted(start.tolist())
    assert agreement_of(found) >= agreement_of(start) - 1e-9
    for i in range(num):
        for j in range(i):
            other = found.clone()
            other[[i, j]] = found[[j, i]]
            assert agreement_of(other) <= agreement_of(found) + 1e-6


@pytest.mark.parametrize(
    ("vectors", "prototypes", "error", "words"),
    [
        (torch.zeros(3), torch.eye(3), ShapeError, "vectors"),
        (torch.zeros(3, 2), torch.eye(2), AssignmentError, "at least as many"),
        (torch.full((2, 2), torch.nan), torch.eye(2), AssignmentError, r"rows \[0, 1\]"),
    ],
)
def test_alignment_refuses_what_it_cannot_align(vectors, prototypes, error, words):
    with pytest.raises(error, match=words):
        align(vectors, prototypes)


# Prototypes of the trained class vectors


@pytest.mark.parametrize("num_classes", [None, 30])
def test_a_warm_start_brings_the_bank_that_its_classifier_fits_on(num_classes):
    torch.manual_seed(0)
    classifier = nn.Linear(40, 30)
    with torch.no_grad():  # classes in groups
        classifier.weight.add_(0.3 * torch.randn(6, 40).repeat_interleave(5, dim=0))
    models = {}
    for bank in ("auto", "separated"):
        model = nn.Sequential(copy.deepcopy(classifier))
        models[bank] = convert_model(
            model, classifier="0", dim=10, num_classes=num_classes, bank=bank, warm_start=True
        ).eval()
    features = torch.randn(2000, 40)
    expected = classifier(features).argmax(dim=1)
    kept = {bank: float((model(features).argmax(dim=1) == expected).float().mean()) for bank, model in models.items()}
    assert models["auto"][0].bank.method == "class vectors"
    assert kept["auto"] > kept["separated"] + 0.1


def test_a_simplex_stays_one():
    model = convert_model(nn.Sequential(nn.Linear(40, 30)), classifier="0", dim=29, warm_start=True)
    assert model[0].bank.method == "simplex"


def test_a_classifier_of_other_classes_is_refused_before_a_bank_is_made_of_it():
    model = nn.Sequential(nn.Linear(40, 30))
    with pytest.raises(ShapeError, match="Convert with the trained classifier's own number of classes"):
        convert_model(model, classifier="0", dim=10, num_classes=25, warm_start=True)
    assert isinstance(model[0], nn.Linear)
