"""Half precision: cosines and losses within derived bounds of float32, finite gradients, and no NaN unseen."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    convert_model,
)
from hyperproto.affine import layers_of
from hyperproto.projection import RowBatchNorm

#: Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Of float32, in sums of this length.
SMALL = 1e-5

both = pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
every_projection = pytest.mark.parametrize("projection", ["none", "linear", "linear+bn"])
every_loss = pytest.mark.parametrize("loss", [BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss])


def make_head(projection: str, **options: object) -> HypersphericalHead:
    """A head with statistics of batch norm from data, in eval mode."""
    head = HypersphericalHead(24, 40, bank=PrototypeBank(40, 24), projection=projection, **options)
    head.assign_(torch.randperm(40, generator=torch.Generator().manual_seed(3)))
    for seed in range(30):
        head(pooled(seed))
    return head.eval()


def pooled(seed: int, num: int = 64) -> Tensor:
    """Features as behind a ReLU and pooling: not negative, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-2, 2, num)[:, None]
    return torch.randn(num, 24, generator=generator).relu() * lengths


def angle_bound(head: HypersphericalHead, features: Tensor, u: float, *, whole_model: bool) -> Tensor:
    """(B,) how far rounding with unit roundoff u can turn an embedding y / |y|, y = S (A x) + b, in radians.

    Features that come in half precision, |dx| <= u |x|, turn y by at most arcsin(|dy| / |y|), |dy| <= u S |A| |x|. In
    a half-precision model A is rounded as well, which doubles that, and so is the product A x.
    """
    linear, norm = layers_of(head.projection)
    x = features.double()
    matrix = torch.eye(24).double() if linear is None else linear.weight.detach().double()
    product = x @ matrix.T
    error = u * x.abs() @ matrix.abs().T
    if whole_model and linear is not None:
        error = (2 + u) * error + u * (product.abs() + (2 + u) * error)
    scale, shift = torch.ones(24).double(), torch.zeros(24).double()
    if norm is not None:
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.detach().double() - scale * norm.running_mean.double()
    y = scale * product + shift
    return ((scale * error).norm(dim=1) / y.norm(dim=1)).clamp(max=1.0).asin() + SMALL


@both
@every_projection
@pytest.mark.parametrize("whole_model", [False, True], ids=["autocast", "model"])
@torch.no_grad()
def test_cosines_and_losses_are_within_the_stated_bounds(dtype, projection, whole_model):
    head, features = make_head(projection), pooled(99)
    scale = float(head.logit_scale)
    expected = head(features) / scale
    bound = angle_bound(head, features, ROUNDOFF[dtype], whole_model=whole_model)
    if whole_model:
        head.to(dtype)
    with nullcontext() if whole_model else torch.autocast("cpu", dtype=dtype):
        logits = head(features.to(dtype))
        labels = torch.arange(64) % 40
        losses = BalancedLoss(head, reduction="none")(logits, labels)
    assert logits.dtype == losses.dtype == torch.float32
    errors = (logits / scale - expected).abs().amax(dim=1)
    assert (errors <= bound).all(), float((errors / bound).max())
    assert 0 < float(errors.max())
    assert float(bound.median()) < {torch.bfloat16: 0.08, torch.float16: 0.01}[dtype]  # tells something
    own = expected.gather(1, labels[:, None])[:, 0]
    # (1 - c)^2 moves by at most 2 (1 - c) d + d^2, d the error of the cosine.
    assert ((losses - (1 - own).square()).abs() <= 2 * (1 - own) * bound + bound.square() + SMALL).all()


@both
@every_projection
def test_autocast_by_itself_rounds_nothing_from_the_features_on(dtype, projection):
    head, features, labels = make_head(projection), pooled(99), torch.arange(64) % 40
    assigners = [DynamicAssigner(head), DynamicAssigner(head)]
    results = []
    for assigner, context in zip(assigners, (nullcontext(), torch.autocast("cpu", dtype=dtype)), strict=True):
        with context:
            logits = head(features)
            losses = [loss(head)(logits, labels) for loss in (BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss)]
            assigner.update(logits.detach(), labels)
        results.append([logits, *losses, assigner.class_means])
    for inside, outside in zip(*results, strict=True):
        assert torch.equal(inside, outside)


@both
@pytest.mark.parametrize("momentum", [0.9, None])
def test_class_means_of_half_precision_embeddings_are_within_the_roundoff(dtype, momentum):
    head = make_head("none", training_output="embedding").train()
    embeddings, labels = head(pooled(99)), torch.arange(64) % 7
    exact, rounded = DynamicAssigner(head, momentum=momentum), DynamicAssigner(head, momentum=momentum)
    exact.update(embeddings, labels)
    rounded.update(embeddings.to(dtype), labels)
    for label in range(7):
        mean = embeddings[labels == label].double().mean(dim=0)
        bound = math.asin(ROUNDOFF[dtype] / float(mean.norm())) + SMALL
        assert float((rounded.class_means[label] - exact.class_means[label]).norm()) <= bound
    assert rounded.class_means.dtype == torch.float32


@both
@every_projection
@every_loss
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_gradients_are_finite(dtype, projection, loss, training_output):
    head = make_head(projection, training_output=training_output).to(dtype).train()
    features = pooled(99).to(dtype)
    features[0] = 0
    features[1] = torch.finfo(dtype).tiny  # below it float16 has no range left for 1 / length
    features.requires_grad_()
    value = loss(DynamicAssigner(head))(head(features), torch.arange(64) % 40)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(features.grad).all()
    assert features.grad.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


# Rows of extreme length


@pytest.mark.filterwarnings("ignore:.*samples since the last step:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projection", ["none", "linear"])
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e20])
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_rows_of_any_length(dtype, projection, length, training_output):
    head = make_head(projection, training_output=training_output).to(dtype).train()
    assigner = DynamicAssigner(head)
    usual = pooled(5, 4).to(dtype)
    features = torch.cat([usual, (usual[:1].double() * length).to(dtype)]).requires_grad_()
    labels = torch.arange(5)
    output = head(features)
    assert output.dtype == torch.float32
    assert torch.equal(output[:4], head(usual))  # the others do not notice
    loss = BalancedLoss(assigner)(output, labels)
    loss.backward()
    if not torch.isfinite(features[4]).all():  # 1e20 is infinite in float16, an error of what comes before the head
        assert torch.isnan(output[4]).all()
        assert torch.isnan(loss)
        assert assigner.step().unseen == (4, *range(5, 40))
        return
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad[:4]).all()
    assert torch.isfinite(features.grad[4]).all()
    if not features[4].any():  # 1e-20 is zero in float16
        assert not output[4].any()
    elif dtype == torch.float32:
        torch.testing.assert_close(output[4], output[0], atol=1e-5, rtol=1e-4)
    else:  # the row itself is rounded once more
        bound = 2 * angle_bound(head, usual[:1], ROUNDOFF[dtype], whole_model=True)
        assert float((output[4] - output[0]).detach().abs().max()) <= float(bound) * float(head.logit_scale)
    step = assigner.step()
    assert (4 in step.unseen) == (not features[4].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e20])
def test_rows_of_any_length_through_batch_norm(dtype, length):
    """Batch norm squares: the batch of a row of 1e20 is normalised, but the running variance leaves float32.

    So it does in nn.BatchNorm1d. What comes out is wrong from then on in eval mode, but not NaN. A batch that is not
    finite itself (1e20 in float16) leaves the running statistics as they were.
    """
    head = make_head("linear+bn").to(dtype)
    features = torch.cat([pooled(5, 4), length * pooled(6, 3)[1:2]]).to(dtype)
    evaluated = head(features)
    assert torch.isfinite(evaluated[torch.isfinite(features).all(dim=1)]).all()
    trained = head.train()(features)
    norm = head.projection[1]
    theirs = nn.BatchNorm1d(24)
    theirs(head.projection[0](features).float())
    assert torch.isfinite(theirs.running_var).all() == (length < 1)
    assert torch.isfinite(norm.running_var).all() == (length < 1 or not torch.isfinite(features).all())
    if torch.isfinite(features).all():
        assert torch.isfinite(trained).all()
        assert trained[:4].any()
        assert torch.isfinite(head.eval()(features)).all()


# Scaling of losses


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_leaves_batch_norm_as_it_was(momentum):
    norm, twin = RowBatchNorm(3, momentum=momentum), RowBatchNorm(3, momentum=momentum)
    overflowed = pooled(1, 4)[:, :3]
    overflowed[2, 0] = float("inf")
    norm(overflowed)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in twin.state_dict().items())
    for seed in range(3):
        rows = pooled(seed, 4)[:, :3]
        norm(rows)
        norm(overflowed)
        twin(rows)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_steps_that_grad_scaler_skips_leave_the_class_means_right(training_output):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
    convert_model(model, dim=5, classifier="2", training_output=training_output)
    assigner = DynamicAssigner(model)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    skipped = []
    for _ in range(25):
        batch, labels = torch.randn(16, 6), torch.randint(8, (16,))
        before = copy.deepcopy(list(model.parameters()))
        scale = scaler.get_scale()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(batch), labels)
        scaler.scale(loss).backward()
        overflow = not all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        unchanged = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert unchanged == overflow == (scaler.get_scale() < scale)
        skipped.append(overflow)
        assert torch.isfinite(loss)
        assert torch.isfinite(assigner.class_means).all()
    assert skipped[0]
    assert not skipped[-1]
    assert float(assigner.class_counts.sum()) == 25 * 16  # the embeddings of a skipped step are as good as any
    assert assigner.step().unseen == ()


@pytest.mark.filterwarnings("ignore:.*samples since the last step:hyperproto.HyperprotoWarning")
def test_activations_that_overflow_leave_no_trace():
    model = convert_model(nn.Sequential(nn.Linear(6, 8)), dim=5, classifier="0", projection="linear")
    model.insert(0, nn.Linear(6, 6))
    assigner = DynamicAssigner(model)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(4, 6)
    batch[2] *= 1e6
    with torch.autocast("cpu", dtype=torch.float16):
        loss = criterion(model(batch), torch.tensor([0, 1, 2, 3]))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert assigner.step().unseen == (2, 4, 5, 6, 7)
