"""What a GPU rounds: half precision by autocast, and TF32 where the user allows it."""

from collections.abc import Iterator

import pytest
import torch
from cases import DIM, LOSSES, NUM_CLASSES, batch, make_head
from torch import Tensor

from hyperproto import BalancedLoss, DynamicAssigner, HypersphericalHead, PrototypeBank, PrototypeCrossEntropyLoss
from hyperproto.functional import prototype_cross_entropy

#: Of cosines, where float32 is what the page promises.
FLOAT32 = 1e-5


def exact_cosines(head: HypersphericalHead, features: Tensor) -> Tensor:
    """(B, C) float64 on the CPU, from the definition: project, normalise, compare."""
    projection, norm = head.projection
    state = {key: value.double().cpu() for key, value in norm.state_dict().items()}
    rows = features.double().cpu() @ projection.weight.detach().double().cpu().T
    rows = (rows - state["running_mean"]) / (state["running_var"] + norm.eps).sqrt() * state["weight"] + state["bias"]
    rows /= rows.norm(dim=1, keepdim=True)
    prototypes = head.bank.prototypes.double().cpu()[head.assignment.cpu()]
    return rows @ prototypes.T


def trained_statistics(device: torch.device) -> HypersphericalHead:
    head = make_head().to(device)
    for seed in range(10):
        head(batch(device, seed=seed)[0])
    return head.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_logits_are_those_of_float64(device, dtype, record_property):
    head = trained_statistics(device)
    features, labels = batch(device, seed=99)
    features = features.to(dtype)  # what autocast makes of a backbone's features is no error of the head
    exact = exact_cosines(head, features)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = head(features)
        loss = BalancedLoss(head, reduction="none")(logits, labels)
        entropy = PrototypeCrossEntropyLoss(head, scale=16.0)(logits, labels)
    assert logits.dtype == loss.dtype == torch.float32
    error = (logits.double().cpu() / float(head.logit_scale) - exact).abs().max()
    record_property("error_of_cosines", float(error))
    assert error < FLOAT32
    own = exact.gather(1, labels.cpu()[:, None])[:, 0]
    torch.testing.assert_close(loss.double().cpu(), (1 - own).square(), atol=4 * FLOAT32, rtol=0)
    expected = prototype_cross_entropy(exact, labels.cpu(), scale=16.0)
    assert float(entropy) == pytest.approx(float(expected), abs=4 * 16 * FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("output", ["logits", "embedding"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_no_gradient_and_no_class_mean(device, loss, output, dtype):
    results = []
    for enabled in (False, True):
        head = make_head(output).to(device)
        assigner = DynamicAssigner(head)
        features, labels = batch(device)
        features = features.to(dtype).float().requires_grad_()
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            value = LOSSES[loss](assigner)(head(features), labels)
        value.backward()
        results.append([value.detach(), features.grad, assigner.class_means, *(p.grad for p in head.parameters())])
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.isfinite(under_autocast).all()
        torch.testing.assert_close(under_autocast, plain, atol=1e-5, rtol=1e-4)


@pytest.fixture
def tf32() -> Iterator[None]:
    """What most training scripts allow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def wide_head(device: torch.device) -> HypersphericalHead:
    """One whose products are large enough for the units that compute in TF32."""
    bank = PrototypeBank(1000, 512, method="random")
    return HypersphericalHead(512, 1000, bank=bank, projection="linear+bn").to(device).eval()


@torch.no_grad()
def test_tf32_that_the_user_allows_rounds_factors_and_nothing_else(device, tf32, record_property):
    head = wide_head(device)
    features = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(device)
    embeddings = head.embed(features)
    cosines = head(features).double().cpu() / float(head.logit_scale)
    record_property("error_of_cosines", float((cosines - exact_cosines(head, features)).abs().max()))
    error = (cosines - embeddings.double().cpu() @ head.class_prototypes.double().cpu().T).abs().max()
    # Unit rows, each factor cut to 11 bits.
    assert error < 2**-9 + FLOAT32
    assert (embeddings.double().norm(dim=1) - 1.0).abs().max() < FLOAT32


@torch.no_grad()
def test_cosines_are_in_float32_where_tf32_is_not_allowed(device):
    head = wide_head(device)
    features = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(device)
    error = (head(features).double().cpu() / float(head.logit_scale) - exact_cosines(head, features)).abs().max()
    assert error < FLOAT32


@torch.no_grad()
def test_embeddings_recovered_from_logits_feed_the_same_means(device):
    means = []
    for output in ("logits", "embedding"):
        head = make_head(output).to(device)
        assigner = DynamicAssigner(head)
        features, labels = batch(device)
        assigner.update(head(features), labels)
        means.append(assigner.class_means)
    assert means[0].shape == (NUM_CLASSES, DIM)
    torch.testing.assert_close(*means, atol=1e-4, rtol=1e-4)
