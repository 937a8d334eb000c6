"""What people do to a head by hand, or with it beside a model: it behaves as a layer of torch, or says what to do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    BankError,
    DynamicAssigner,
    HypersphericalHead,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    describe,
    fit_logit_scale,
)
from hyperproto.projection import RowBatchNorm
from hyperproto.testing import SEEDS

# Tiny data: the scale has no best value, or a bound is the best.
pytestmark = pytest.mark.filterwarnings("ignore:fit_logit_scale:hyperproto.HyperprotoWarning")


def test_widths_are_told_as_by_nn_linear_and_fixed():
    head = HypersphericalHead(16, 8, dim=4)
    assert (head.in_features, head.out_features) == (16, 8)
    for name in ("num_classes", "dim", "in_features", "out_features"):
        with pytest.raises(ArgumentError, match=f"{name} is fixed"):
            setattr(head, name, 3)
        setattr(head, name, getattr(head, name))
    assert head(torch.randn(2, 16)).shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_topk_takes_embeddings_and_refuses_features(dtype):
    head = HypersphericalHead(16, 8)
    features = torch.randn(6, 16)
    embeddings = head.embed(features).detach().to(dtype)
    embeddings[0] = 0.0
    assert float(head.topk(embeddings, k=3)[0].abs().max()) <= 1.01
    wrong = (features, 0.9 * embeddings, torch.full((1, 16), torch.nan), torch.full((1, 16), torch.inf))
    for rows in wrong:
        with pytest.raises(ArgumentError, match=r"head\.embed"):
            head.topk(rows, k=3)


def pair(momentum: float | None = 0.1) -> list[nn.BatchNorm1d]:
    return [nn.BatchNorm1d(4, momentum=momentum), RowBatchNorm(4, momentum=momentum)]


@given(
    seed=SEEDS,
    passes=st.lists(st.sampled_from(["track", "untracked", "eval"]), min_size=1, max_size=5),
    momentum=st.sampled_from([0.1, 0.0, None]),
)
def test_batch_norm_keeps_statistics_as_torchs_does(seed, passes, momentum):
    generator = torch.Generator().manual_seed(seed)
    norms = pair(momentum)
    for kind in passes:
        rows = torch.randn(5, 4, generator=generator) + 1.0
        outputs = []
        for norm in norms:
            norm.track_running_stats = kind != "untracked"
            outputs.append(norm.train(kind != "eval")(rows))
        torch.testing.assert_close(*outputs)
    for name, buffer in norms[0].named_buffers():
        torch.testing.assert_close(norms[1].get_buffer(name), buffer)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics_takes_the_batchs(training):
    rows = torch.randn(6, 4) + 2.0
    outputs = []
    for norm in pair():
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        outputs.append(norm.train(training)(rows))
    torch.testing.assert_close(*outputs)


def test_reset_parameters_starts_all_of_a_head_anew():
    head, fresh = (HypersphericalHead(16, 8, dim=4, bank=PrototypeBank(9, 4), seed=3) for _ in range(2))
    state = torch.get_rng_state()
    with torch.no_grad():
        for tensor in head.projection.state_dict().values():
            tensor.add_(1)
        head.assign_(torch.arange(8).flip(0))
        head.logit_scale.fill_(3.0)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name
    assert torch.equal(head.anchors, fresh.anchors)


def test_reset_parameters_fills_a_head_that_comes_from_meta():
    head, fresh = HypersphericalHead(16, 8, dim=4).to("meta"), HypersphericalHead(16, 8, dim=4)
    head.to_empty(device="cpu")
    head.projection[0].weight.data.fill_(7.0)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    head.bank.load_state_dict(fresh.bank.state_dict())
    features = torch.randn(5, 16)
    torch.testing.assert_close(head.eval()(features), fresh.eval()(features))


def two_tasks(**second: object) -> nn.ModuleDict:
    heads = {"age": HypersphericalHead(16, 8, dim=4), "colour": HypersphericalHead(16, 8, dim=4, **second)}
    return nn.ModuleDict(heads)


@pytest.mark.parametrize(
    "second", [{"logit_scale": 40.0}, {"bank": "separated", "seed": 3}, {"bank": PrototypeBank(9, 4)}]
)
@pytest.mark.parametrize("use", [BalancedLoss, DynamicAssigner, lambda model: fit_logit_scale(model, [])])
def test_of_two_heads_that_differ_none_speaks_for_the_other(use, second):
    with pytest.raises(BankError, match="one of the heads in place of the model"):
        use(two_tasks(**second))


def test_two_heads_alike_have_one_criterion():
    assert BalancedLoss(two_tasks()).head.num_classes == 8


def test_describe_tells_whether_the_scale_was_fitted_and_the_criterions_own():
    model = nn.Sequential(HypersphericalHead(16, 8, dim=4))
    inputs = torch.randn(64, 16)
    assert "never fitted" in describe(model)
    criterion = PrototypeCrossEntropyLoss(model, scale=21.0)
    assert "trains with scale 21" in describe(model, criterion)
    scale = fit_logit_scale(model, [(inputs, model.eval()(inputs).argmax(dim=1))])
    assert "never fitted" not in describe(model)
    assert f"{scale:.4g}" in describe(model)
    assert "trains with" not in describe(model, PrototypeCrossEntropyLoss(model, scale=scale))
    assert "trains with" not in describe(model, BalancedLoss(model))


def test_describe_tells_the_banks_of_all_tasks():
    text = describe(two_tasks(bank=PrototypeBank(9, 4, method="random"), logit_scale=40.0))
    assert all(words in text for words in ("bank: orthoplex, 8", "bank: random, 9", "scale: 40"))
