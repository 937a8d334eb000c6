"""The fitted scale."""

import gc
import math
from collections.abc import Iterator

import pytest
import torch
from clouds import Batches
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_on_ranks
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hyperproto import (
    ArgumentError,
    HeadNotFoundError,
    HyperprotoWarning,
    HypersphericalHead,
    LabelError,
    ShapeError,
    fit_logit_scale,
)
from hyperproto.testing import SEEDS


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), HypersphericalHead(8, 4, dim=3))


def loader(model: nn.Module, noise: float = 1.0) -> DataLoader:
    features = torch.randn(400, 6)
    labels = (model.eval()(features) + noise * torch.randn(400, 4)).argmax(dim=1)
    model.train()
    return DataLoader(TensorDataset(features, labels), batch_size=64)


def test_the_gradient_of_the_likelihood_vanishes_at_the_fitted_scale():
    model = make_model()
    data = loader(model)
    scale = fit_logit_scale(model, data, match="likelihood")
    head = model[2]
    model.eval()
    cosines = torch.cat([model(x) for x, _ in data]).double() / scale
    labels = torch.cat([y for _, y in data])
    own = cosines.gather(1, labels[:, None]).mean()

    def slope(s: float) -> float:  # d NLL / ds = E[cos under the softmax] - E[own cos]
        return float((((s * cosines).softmax(dim=1) * cosines).sum(dim=1).mean() - own).item())

    assert float(head.logit_scale) == pytest.approx(brentq(slope, 1e-2, 1e4), rel=1e-3)


def test_no_global_randomness_is_used():
    model = make_model()
    data = DataLoader(loader(model).dataset, batch_size=64, shuffle=True)
    state = torch.get_rng_state()
    fit_logit_scale(model, data)
    assert torch.equal(torch.get_rng_state(), state)


def fit_on_rank(rank: int, shares: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8))
    model = nn.Sequential(body, HypersphericalHead(8, 4, dim=3))
    features, labels = torch.randn(90, 6), torch.randint(4, (90,))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(features + rank)  # from here on each rank has running statistics of its own
    # Unequal shares, and a rank without any.
    mine = {0: slice(0, 60), 1: slice(60, 90), 2: slice(0, 0)}[rank] if shares else slice(None)
    batches = list(zip(features[mine].split(16), labels[mine].split(16), strict=True)) if rank < 2 or not shares else []
    scale = fit_logit_scale(wrapped, batches)
    # What one process finds with all the data and the first rank's model.
    return scale, float(model[1].logit_scale)


@pytest.mark.parametrize("shares", [True, False])
def test_all_ranks_arrive_at_one_scale(shares):
    scales = run_on_ranks(fit_on_rank, 3, shares)
    assert len({scale for pair in scales for scale in pair}) == 1
    alone = run_on_ranks(fit_on_rank, 1, False)
    assert scales[0][0] == pytest.approx(alone[0][0], rel=1e-3)


def test_only_the_scale_changes():
    model = make_model()
    data = loader(model)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    predictions = model.eval()(data.dataset.tensors[0]).argmax(dim=1)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    fit_logit_scale(model, data)
    assert [module.training for module in model.modules()] == modes
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.logit_scale"}
    assert torch.equal(model.eval()(data.dataset.tensors[0]).argmax(dim=1), predictions)


def test_always_right_gives_the_largest_scale_and_soft_targets_work():
    model = make_model()
    features = torch.randn(50, 6)
    labels = model.eval()(features).argmax(dim=1)
    with pytest.warns(HyperprotoWarning, match="the larger the scale the better"):
        sure = fit_logit_scale(model, [(features, labels)])
    soft = fit_logit_scale(model, [(features, nn.functional.one_hot(labels, 4).float() * 0.7 + 0.075)])
    assert 1 < soft < sure
    assert math.isfinite(sure)


def test_bad_input_leaves_the_old_scale():
    model = make_model()
    before = float(model[2].logit_scale)
    with pytest.raises(ArgumentError, match="no samples"):
        fit_logit_scale(model, [])
    with pytest.raises(LabelError, match="from 0 to 4"):
        fit_logit_scale(model, [(torch.randn(2, 6), torch.tensor([0, 4]))])
    with pytest.raises(ArgumentError, match="NaN"):
        fit_logit_scale(model, [(torch.full((2, 6), float("nan")), torch.tensor([0, 1]))])
    assert float(model[2].logit_scale) == before
    assert all(module.training for module in model.modules())
    with pytest.raises(HeadNotFoundError):
        fit_logit_scale(nn.Linear(2, 2), [])


def test_an_output_that_is_no_matrix_of_logits_is_named():
    maps = nn.Sequential(make_model(), nn.Unflatten(1, (2, 2)))
    with pytest.raises(ShapeError, match=r"logits of shape \(B, 4\) .*, got \(3, 2, 2\)"):
        fit_logit_scale(maps, [(torch.randn(3, 6), torch.zeros(3, dtype=torch.int64))])


class TwoHeads(nn.Module):
    """A model that averages the logits of two heads, as distilled transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = HypersphericalHead(6, 4, dim=3)
        self.second = HypersphericalHead(6, 4, bank=self.first.bank)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (self.first(features) + self.second(features)) / 2


def test_all_heads_of_a_model_get_the_scale():
    model = TwoHeads()
    scale = fit_logit_scale(model, loader(model))
    assert float(model.first.logit_scale) == float(model.second.logit_scale) == scale


def test_the_scale_keeps_to_its_bounds():
    head = HypersphericalHead(2, 2, projection="none", bank="simplex")
    labels = torch.tensor([0, 1]).repeat(20)
    wrong = head.class_prototypes[1 - labels]
    with pytest.warns(HyperprotoWarning, match="the smaller the scale the better"):
        assert fit_logit_scale(head, [(wrong, labels)]) == pytest.approx(1e-2, rel=1e-2)
    # All right, and by so little that more is always better.
    own, across = head.class_prototypes[labels], head.class_prototypes.flip(1)[labels] * torch.tensor([1.0, -1.0])
    with pytest.warns(HyperprotoWarning, match="the larger the scale the better"):
        assert fit_logit_scale(head, [(5e-4 * own + across, labels)]) == pytest.approx(1e4, rel=1e-2)


WHEREVER_IT_LIES = given(seed=SEEDS, num_classes=st.integers(2, 8), log_true=st.floats(-1.0, 4.0), soft=st.booleans())


def drawn(
    seed: int, num_classes: int, log_true: float, soft: bool
) -> tuple[HypersphericalHead, Batches, Tensor, Tensor]:
    """A head, samples whose scale is about exp(log_true), with labels or soft targets, their cosines, and targets."""
    generator = torch.Generator().manual_seed(seed)
    head = HypersphericalHead(4, num_classes, projection="none", bank="random", seed=seed)
    features = torch.randn(300, 4, generator=generator)
    cosines = (head.eval()(features) / head.logit_scale).double()
    labels = torch.multinomial((math.exp(log_true) * cosines).softmax(dim=1), 1, generator=generator)[:, 0]
    # A tenth at random, so that there is a maximum.
    labels[::10] = torch.randint(num_classes, (30,), generator=generator)
    target = nn.functional.one_hot(labels, num_classes).double() * (0.8 if soft else 1.0) + (0.2 / num_classes) * soft
    return head, [(features, target.float() if soft else labels)], cosines, target


@WHEREVER_IT_LIES
def test_the_scale_is_that_of_the_likelihood_wherever_it_lies(seed, num_classes, log_true, soft):
    head, samples, cosines, target = drawn(seed, num_classes, log_true, soft)

    def slope(s: float) -> float:
        return float(((s * cosines).softmax(dim=1) * cosines).sum() - (target * cosines).sum())

    if slope(2e-2) < 0.0:
        fitted = fit_logit_scale(head, samples, match="likelihood")
        assert fitted == pytest.approx(brentq(slope, 1e-2, 1e4), rel=1e-3)


@WHEREVER_IT_LIES
def test_mean_confidence_is_accuracy_at_the_scale_that_matches_it(seed, num_classes, log_true, soft):
    head, samples, cosines, target = drawn(seed, num_classes, log_true, soft)
    accuracy = float(target.gather(1, cosines.argmax(dim=1, keepdim=True)).mean())

    def excess(s: float) -> float:
        return float((s * cosines).softmax(dim=1).amax(dim=1).mean()) - accuracy

    if excess(2e-2) < 0.0 < excess(5e3):
        fitted = fit_logit_scale(head, samples, match="confidence")
        assert excess(fitted) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1]], ids=["always right", "always wrong"])
def test_confidence_cannot_match_an_accuracy_of_one_or_none(labels):
    head = HypersphericalHead(2, 2, projection="none", bank="simplex")
    prototype = head.class_prototypes[0].expand(4, -1)
    with pytest.warns(HyperprotoWarning):
        scale = fit_logit_scale(head, [(prototype, torch.tensor(labels))], match="confidence")
    assert scale == pytest.approx(1e4 if labels[0] == 0 else 1e-2)


def test_what_is_matched_is_one_of_two():
    with pytest.raises(ArgumentError, match="'likelihood', 'confidence'"):
        fit_logit_scale(make_model(), [], match="accuracy")


def test_memory_does_not_grow_with_the_samples():
    head = HypersphericalHead(8, 500, dim=8, projection="none", bank="random")
    features = torch.randn(64, 8)
    batch = (features, torch.multinomial((head(features) / 4.0).softmax(dim=1), 1)[:, 0])
    held = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(6):
            gc.collect()
            # Cosines that are kept from one batch to the next.
            held.append(
                sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() == 2)
            )
            yield batch

    fit_logit_scale(head, batches(), match="likelihood")
    assert held[-1] == held[2]


def test_a_scale_that_is_a_parameter_is_written_too():
    model = make_model()
    model[2].logit_scale = nn.Parameter(torch.tensor(10.0))
    data = loader(model)
    assert fit_logit_scale(model, data) == float(model[2].logit_scale.detach())
    assert model[2].logit_scale.requires_grad
    with torch.inference_mode():
        assert fit_logit_scale(model, data) == float(model[2].logit_scale)
