"""What changes nothing: where the features' origin is, how the sphere is turned, and how often or where one fits."""

import copy

import pytest
import torch
import torch.distributed as dist
from clouds import batched, clouds, make_head, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import nn

from hyperproto import DynamicAssigner, HypersphericalHead, PrototypeBank, fit_head, fit_logit_scale, refit_head
from hyperproto.functional import solve_assignment
from hyperproto.testing import SEEDS

# Tiny data: the scale has no best value, or a bound is the best.
pytestmark = pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning")


def turn(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed).double()).Q.float()


@given(seed=SEEDS, num_classes=st.integers(3, 9), offset=st.floats(-30, 30))
@settings(max_examples=20)
def test_shifting_the_features_changes_no_fitted_head(seed, num_classes, offset):
    """Pooled features behind a ReLU are all far from zero, on one side."""
    features, labels = clouds(num_classes, 12, seed=seed)
    shift = offset * torch.linspace(0.2, 1.0, 12)
    head, shifted = (make_head(num_classes, 12, 4, projection="linear+bn") for _ in range(2))
    fit_head(head, batched(features, labels))
    fit_head(shifted, batched(features + shift, labels))
    assert torch.equal(shifted.assignment, head.assignment)
    torch.testing.assert_close(shifted.embed(features + shift), head.embed(features), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:training_output:hyperproto.HyperprotoWarning")
@given(seed=SEEDS, num_classes=st.integers(2, 12), spare=st.integers(0, 4), dim=st.integers(2, 6))
def test_turning_embeddings_and_bank_together_changes_no_assignment(seed, num_classes, spare, dim):
    rotation = turn(dim, seed)
    prototypes = normal(num_classes + spare, dim, seed=seed)
    embeddings = nn.functional.normalize(normal(3 * num_classes, dim, seed=seed + 1))
    steps = []
    for rows, bank in ((embeddings, prototypes), (embeddings @ rotation, prototypes @ rotation)):
        head = HypersphericalHead(
            dim,
            num_classes,
            bank=PrototypeBank.from_tensor(bank),
            projection="none",
            training_output="embedding",
        )
        assigner = DynamicAssigner(head)
        assigner.update(rows, torch.arange(len(rows)) % num_classes)
        steps.append((assigner.step(), head.assignment, assigner.class_means))
    (step, assignment, means), (turned_step, turned, turned_means) = steps
    assert torch.equal(turned, assignment)
    assert turned_step.similarity_after == pytest.approx(step.similarity_after, abs=1e-5)
    torch.testing.assert_close(turned_means, means @ rotation, atol=1e-5, rtol=0)
    for method in ("dense", "sparse"):
        solution = solve_assignment(means @ rotation, prototypes @ rotation, method=method)
        assert torch.equal(solution.assignment, assignment)


@given(seed=SEEDS, start=st.floats(0.05, 500.0), noise=st.floats(0.2, 3.0))
@settings(max_examples=20)
def test_the_fitted_scale_does_not_depend_on_the_one_before(seed, start, noise):
    head = HypersphericalHead(6, 5, dim=4).eval()
    features = normal(300, 6, seed=seed)
    labels = (head(features) / head.logit_scale + noise * normal(300, 5, seed=seed + 1)).argmax(dim=1)
    once = fit_logit_scale(head, batched(features, labels))
    assert fit_logit_scale(head, batched(features, labels)) == pytest.approx(once, rel=1e-3)
    head.logit_scale.fill_(start)
    assert fit_logit_scale(head, batched(features, labels)) == pytest.approx(once, rel=1e-3)


# Ranks that all have the same data, as in tensor parallelism


def fit_on_rank(rank: int) -> list[tuple[dict[str, torch.Tensor], float]]:
    del rank
    features, labels = clouds(5, 8, apart=1.0)
    refitted, calibrated = make_head(5, 8, 4), make_head(5, 8, 4)
    fit = refit_head(refitted, batched(features, labels), iterations=5)
    scale = fit_logit_scale(calibrated, batched(features, labels))
    return [(copy.deepcopy(refitted.state_dict()), fit.accuracy), (copy.deepcopy(calibrated.state_dict()), scale)]


def test_fits_that_average_over_samples_do_not_ask_how_often_these_are_there():
    alone = fit_on_rank(0)
    assert not dist.is_initialized()
    for results in run_on_ranks(fit_on_rank, 2):
        for (state, number), (expected, expected_number) in zip(results, alone, strict=True):
            assert number == pytest.approx(expected_number, rel=1e-3)
            for name, value in state.items():
                torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-3, msg=name)
