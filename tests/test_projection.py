"""The projection: where it starts, and its batch norm."""

import math

import numpy as np
import pytest
import torch
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from hyperproto import HypersphericalHead, convert_model, to_linear


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_the_linear_map_starts_as_that_of_torch(projection):
    head = HypersphericalHead(64, 600, dim=512, bank="random", projection=projection, training_output="embedding")
    weight = (head.projection if projection == "linear" else head.projection[0]).weight.detach()
    bound = 1.0 / math.sqrt(64)
    # Of 32768 draws, uniform in +-bound: four standard errors.
    assert abs(float(weight.mean())) < 4 * bound / math.sqrt(3 * weight.numel())
    assert float(weight.square().mean()) == pytest.approx(bound**2 / 3, rel=4 * math.sqrt(0.8 / weight.numel()))
    assert 0.99 * bound < float(weight.max()) <= bound
    assert -bound <= float(weight.min()) < -0.99 * bound
    torch.testing.assert_close(weight.std(), nn.Linear(64, 512).weight.detach().std(), rtol=0.02, atol=0)


@pytest.mark.parametrize("momentum", [0.3, 0.01, None])
def test_running_statistics_follow_the_momentum_of_batch_norm(momentum):
    head = HypersphericalHead(6, 5, dim=4, projection="linear+bn")
    head.projection[1].momentum = momentum
    reference = nn.BatchNorm1d(4, momentum=momentum)
    for _ in range(3):
        features = torch.randn(16, 6)
        head(features)
        reference(head.projection[0](features))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(head.projection[1], name), getattr(reference, name))


def test_folding_knows_the_epsilon_of_batch_norm():
    model = convert_model(nn.Sequential(nn.Linear(6, 8)), dim=4, classifier="0")
    batch_norm = model[0].projection[1]
    batch_norm.running_var.copy_(torch.tensor([1e-5, 1e-6, 1.0, 1e-5]))  # eps is 1e-5
    batch_norm.running_mean.normal_()
    features, head = torch.randn(50, 6), model.eval()[0]
    # The head without the division by the length of what is projected, but for one number for all inputs.
    expected = (head.projection(features) @ head.class_prototypes.T).detach()
    folded = to_linear(model)(features).detach()
    torch.testing.assert_close(folded / folded.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-6)


def test_batch_norm_synchronised_frozen_and_thawed_computes_the_same():
    """The functions of timm put layers for maps in the place of those for rows."""
    model = convert_model(nn.Sequential(nn.Linear(6, 8)), dim=4, classifier="0")
    model(torch.randn(32, 6))
    features = torch.randn(5, 6)
    expected = model.eval()(features)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for change, kind in ((freeze_batch_norm_2d, FrozenBatchNorm2d), (unfreeze_batch_norm_2d, nn.BatchNorm2d)):
        model = change(model).eval()
        assert isinstance(model[0].projection[1], kind)
        torch.testing.assert_close(model(features), expected)


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_bank_and_projection_are_drawn_independently(method):
    correlations = []
    for seed in range(12):
        head = HypersphericalHead(16, 40, dim=8, bank=method, projection="linear", seed=seed)
        drawn = head.projection.weight.detach().flatten()  # 128 numbers
        correlations.append(np.corrcoef(head.bank.prototypes.flatten()[:128], drawn)[0, 1])
    # Of 128 pairs each has a deviation of 0.09, their mean over twelve seeds one of 0.026.
    assert abs(np.mean(correlations)) < 0.09
