"""The head: cosines, invariances, recovery of embeddings, and its life among other tools."""

import copy
import io
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    AssignmentError,
    BankError,
    HypersphericalHead,
    PrototypeBank,
    ShapeError,
    get_heads,
)
from hyperproto.separation import PLACED_PROBABILITY, default_logit_scale
from hyperproto.testing import SEEDS, check_assignment, heads


def rows(num: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(rows(dim, dim, seed).double())[0].float()


def spare_head(**kwargs: object) -> HypersphericalHead:
    head = HypersphericalHead(12, 5, bank=PrototypeBank(8, 4), **kwargs)
    head.assign_(torch.tensor([6, 0, 3, 7, 1]))
    return head


# Mathematics


@given(head=heads(), seed=SEEDS)
def test_logits_are_scaled_cosines_with_the_assigned_prototypes(head, seed):
    features = rows(6, head.in_features, seed)
    x, w = features.double().numpy(), head.bank.prototypes.double().numpy()
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = float(head.logit_scale) * z @ w[head.assignment.numpy()].T
    np.testing.assert_allclose(head(features).numpy(), expected, atol=2e-5 * float(head.logit_scale))


@given(head=heads(), seed=SEEDS)
def test_rotating_features_and_prototypes_together_changes_no_logit(head, seed):
    features, turn = rows(6, head.in_features, seed), rotation(head.dim, seed)
    rotated = HypersphericalHead(
        head.dim,
        head.num_classes,
        bank=PrototypeBank.from_tensor(head.bank.prototypes @ turn),
        projection="none",
        logit_scale=float(head.logit_scale),
    )
    rotated.assign_(head.assignment)
    torch.testing.assert_close(rotated(features @ turn), head(features), atol=1e-4, rtol=1e-4)


@given(head=heads(), seed=SEEDS, exponent=st.integers(-15, 15))
def test_scaling_features_changes_no_logit(head, seed, exponent):
    features = rows(6, head.in_features, seed)
    torch.testing.assert_close(head(features * 10.0**exponent), head(features), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("projection", ["none", "linear"])
@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e18])
def test_scaling_features_changes_no_logit_through_a_projection(projection, factor):
    head = HypersphericalHead(8, 4, projection=projection)
    features = rows(6, 8)
    torch.testing.assert_close(head(features * factor), head(features), atol=1e-4, rtol=1e-5)


@given(head=heads(), seed=SEEDS)
def test_relabelling_classes_permutes_the_columns(head, seed):
    features = rows(6, head.in_features, seed)
    before = head(features)
    order = torch.randperm(head.num_classes, generator=torch.Generator().manual_seed(seed))
    head.assign_(head.assignment[order].clone())
    torch.testing.assert_close(head(features), before[:, order])


@given(head=heads(), seed=SEEDS)
def test_logits_tell_the_embeddings_up_to_what_is_orthogonal_to_all_prototypes(head, seed):
    features = rows(6, head.in_features, seed)
    recovered = head.recover_embeddings(head(features)).double()
    frame = head.class_prototypes.double().numpy()
    span = np.linalg.pinv(frame, rcond=1e-5) @ frame  # (D, D) projector
    condition = np.linalg.cond(frame) if np.linalg.matrix_rank(frame, tol=1e-4) == min(frame.shape) else 1e6
    expected = head.embed(features).double().numpy() @ span
    if condition < 50:
        np.testing.assert_allclose(recovered.numpy(), expected, atol=1e-6 * condition**2 + 1e-5)
    cosines = head(features) / head.logit_scale
    torch.testing.assert_close(recovered.float() @ head.class_prototypes.T, cosines, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("num_classes", "num_prototypes", "dim"),
    [(6, 6, 10), (6, 9, 10), (10, 10, 5), (30, 30, 8), (20, 24, 12), (3, 8, 4)],
)
def test_recovery_on_the_banks_that_people_use(num_classes, num_prototypes, dim):
    head = HypersphericalHead(dim, num_classes, bank=PrototypeBank(num_prototypes, dim), projection="none")
    head.assign_(torch.randperm(num_prototypes)[:num_classes])
    frame = head.class_prototypes.double()
    inside = rows(7, num_classes).double() @ frame  # within the span
    embeddings = (inside / inside.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(head.recover_embeddings(head(embeddings)), embeddings, atol=2e-6, rtol=0)


def test_recovery_follows_a_loaded_assignment():
    source, target = spare_head(), spare_head()
    target.assign_(torch.tensor([1, 2, 3, 4, 5]))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.anchors, source.anchors)
    assert torch.equal(target.anchor_inverse, source.anchor_inverse)


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(2, 8), (10, 9), (100, 99), pytest.param(1000, 999, marks=pytest.mark.slow)]
)
def test_default_scale_gives_a_placed_sample_the_documented_probability(num_classes, dim):
    bank = PrototypeBank(num_classes, dim, method="simplex")
    head = HypersphericalHead(dim, num_classes, bank=bank, projection="none")
    placed = head(head.class_prototypes[:1]).softmax(dim=1)[0, 0]
    assert float(placed) == pytest.approx(PLACED_PROBABILITY, abs=1e-3)


@pytest.mark.parametrize(
    ("num_classes", "scale"), in_front([(10, 4.5565), (100, 7.0711), (1000, 11.4904)], (10, 4.5565), (100, 7.0711))
)
def test_default_scale_on_a_cross_polytope(num_classes, scale):
    head = HypersphericalHead(num_classes // 2, num_classes, bank="orthoplex", projection="none")
    simplex = (num_classes - 1) / num_classes * np.log(99 * (num_classes - 1))
    spread = max(1.0, simplex / np.sqrt(num_classes - 1))
    assert scale == pytest.approx(min(simplex, spread * np.sqrt(num_classes / 2)), rel=1e-4)
    assert float(head.logit_scale) == pytest.approx(scale, rel=1e-4)
    # All others are at a right angle, but for the opposite one.
    expected = 1 / (1 + (num_classes - 2) * np.exp(-scale) + np.exp(-2 * scale))
    placed = head(head.class_prototypes).softmax(dim=1).diagonal()
    np.testing.assert_allclose(placed.numpy(), expected, rtol=1e-4)


@given(num_classes=st.integers(2, 60), dim=st.integers(2, 60), seed=SEEDS)
def test_no_placed_sample_gets_more_than_the_documented_probability(num_classes, dim, seed):
    bank = PrototypeBank(num_classes, dim, method="random", seed=seed)
    scale = default_logit_scale(bank.prototypes, num_classes)
    cosines = bank.prototypes.double() @ bank.prototypes.double().T
    # In the mean of the odds' logarithms, as Jensen's inequality has it.
    others = (scale * cosines).masked_fill(torch.eye(num_classes, dtype=torch.bool), -torch.inf).logsumexp(dim=1)
    assert float((scale - others).mean()) <= np.log(PLACED_PROBABILITY / (1 - PLACED_PROBABILITY)) + 1e-4


@given(num_classes=st.integers(2, 60), dim=st.integers(2, 60), seed=SEEDS)
def test_the_default_scale_of_any_bank_is_the_documented_formula(num_classes, dim, seed):
    prototypes = PrototypeBank(num_classes, dim, method="random", seed=seed).prototypes
    cosines = prototypes.double().numpy() @ prototypes.double().numpy().T
    rho = cosines[~np.eye(num_classes, dtype=bool)].mean()
    placed = np.log(99 * (num_classes - 1)) / max(1 - rho, 0.05)
    expected = min(placed, np.sqrt(dim) * max(1, placed / np.sqrt(num_classes - 1)))
    assert default_logit_scale(prototypes, num_classes) == pytest.approx(expected, rel=1e-4)


@given(dims=st.tuples(st.integers(2, 40), st.integers(2, 40)), num_classes=st.integers(2, 40))
def test_default_scale_grows_with_the_classes_and_knows_no_dimension(dims, num_classes):
    scales = [
        default_logit_scale(PrototypeBank(classes, dim, method="simplex").prototypes, classes)
        for classes in (num_classes, num_classes + 1)
        for dim in (classes - 1 + dims[0], classes - 1 + dims[1])
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert scales[2] == pytest.approx(scales[3], rel=1e-4)
    assert scales[0] < scales[2]


@pytest.mark.filterwarnings("ignore:2 prototypes of 3 equal others:hyperproto.HyperprotoWarning")
def test_default_scale_is_bounded_for_overlapping_prototypes():
    bank = PrototypeBank.from_tensor(torch.tensor([[1.0, 0.0], [1.0, 1e-9], [1.0, 1e-8]]))
    assert default_logit_scale(bank.prototypes, 3) < 200


def test_a_bank_without_values_counts_as_one_that_favours_no_direction():
    meta = torch.empty(10, 9, device="meta")
    assert default_logit_scale(meta, 10) == pytest.approx(0.9 * np.log(99 * 9))


def test_an_old_checkpoint_brings_its_own_scale():
    head, old = HypersphericalHead(12, 5, dim=4), HypersphericalHead(12, 5, dim=4, logit_scale=13.92)
    head.load_state_dict(old.state_dict())
    assert float(head.logit_scale) == pytest.approx(13.92)


# Training output


def test_embedding_output_in_train_mode_and_logits_in_eval_mode():
    head = HypersphericalHead(12, 5, dim=4, training_output="embedding")
    features = rows(6, 12)
    assert head(features).shape == (6, 4)
    assert head.eval()(features).shape == (6, 5)


def test_leading_dimensions_pass_through():
    head = HypersphericalHead(12, 5, dim=4).eval()
    features = rows(6, 12)
    stacked = features.view(2, 3, 12)
    torch.testing.assert_close(head(stacked), head(features).view(2, 3, 5))
    assert head.train()(stacked).shape == (2, 3, 5)


@pytest.mark.parametrize("projection", ["none", "linear", "linear+bn", "auto"])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_any_batch_size_trains(projection, num_rows):
    head = HypersphericalHead(4, 5, dim=4, projection=projection)
    features = rows(num_rows, 4).requires_grad_()
    logits = head(features)
    logits.sum().backward()
    assert logits.shape == (num_rows, 5)
    assert torch.isfinite(features.grad).all()


def test_two_classes():
    head = HypersphericalHead(8, 2, dim=2)
    cosine = head.class_prototypes[0] @ head.class_prototypes[1]
    assert float(cosine) == pytest.approx(-1.0, abs=1e-6)


def test_zero_features_give_zero_logits_and_finite_gradients():
    head = HypersphericalHead(4, 5, projection="none")
    features = torch.zeros(3, 4, requires_grad=True)
    logits = head(features)
    logits.sum().backward()
    assert torch.equal(logits, torch.zeros(3, 5))
    assert float(features.grad.abs().max()) < 1e3


def test_batch_norm_of_the_projection_agrees_with_torch():
    head = HypersphericalHead(6, 5, dim=3, projection="linear+bn")
    linear, ours = head.projection
    theirs = nn.BatchNorm1d(3)
    features = linear(rows(9, 6))
    torch.testing.assert_close(ours(features), theirs(features))
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))
    assert ours.num_batches_tracked == 1


def test_update_bn_of_torch_gives_plain_averages():
    ours, theirs = HypersphericalHead(6, 5, dim=6, projection="linear+bn").projection[1], nn.BatchNorm1d(6)
    loader = [rows(8, 6, seed) for seed in range(3)]
    for module in (ours, theirs):
        torch.optim.swa_utils.update_bn(loader, module)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_seed_decides_everything_and_the_global_generator_nothing():
    state = torch.get_rng_state()
    first = HypersphericalHead(12, 20, dim=4, bank="random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = HypersphericalHead(12, 20, dim=4, bank="random", seed=3)
    other = HypersphericalHead(12, 20, dim=4, bank="random", seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.bank.prototypes, other.bank.prototypes)
    assert not torch.equal(first.projection[0].weight, other.projection[0].weight)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_in_chunks_is_topk_of_all_logits(k, monkeypatch):
    monkeypatch.setattr("hyperproto.codebook.TOPK_CHUNK", 3)
    head = HypersphericalHead(4, 7, bank=PrototypeBank(9, 4, method="random"), projection="none", logit_scale=1.0)
    head.assign_(torch.tensor([8, 0, 3, 5, 1, 7, 2]))
    embeddings = head.embed(rows(6, 4))
    cosines, labels = head.topk(embeddings, k)
    expected = head(embeddings).topk(k, dim=1)
    torch.testing.assert_close(cosines, expected.values)
    assert torch.equal(labels, expected.indices)


def test_topk_refuses_what_it_cannot_rank():
    head = HypersphericalHead(4, 7, projection="none")
    for k in (0, 8):
        with pytest.raises(ArgumentError, match=r"\[1, 7\]"):
            head.topk(torch.zeros(2, 4), k)
    with pytest.raises(ShapeError, match=r"\(B, 4\)"):
        head.topk(torch.zeros(2, 7), 1)


def test_a_head_of_embeddings_does_not_recover_them():
    head = HypersphericalHead(12, 5, dim=4, training_output="embedding")
    with pytest.raises(ShapeError, match="expects embeddings"):
        head.recover_embeddings(torch.zeros(2, 5))


# Life


def test_nothing_trains_but_the_projection():
    names = {name for name, _ in HypersphericalHead(12, 5, dim=4).named_parameters()}
    assert names == {"projection.0.weight", "projection.1.weight", "projection.1.bias"}
    assert not list(HypersphericalHead(12, 5, projection="none").parameters())


def test_state_dict_round_trip():
    source = spare_head()
    source(rows(9, 12))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target = HypersphericalHead(12, 5, bank=PrototypeBank(8, 4), seed=5)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    features = rows(3, 12)
    assert torch.equal(source.eval()(features), target.eval()(features))
    assert set(source.state_dict()) == {
        "assignment",
        "assignment_record",
        "logit_scale",
        "format_version",
        "bank.prototypes",
        "projection.0.weight",
        "projection.1.weight",
        "projection.1.bias",
        "projection.1.running_mean",
        "projection.1.running_var",
        "projection.1.num_batches_tracked",
    }


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_are_equal_and_independent(copier):
    head = spare_head()
    twin = copier(head)
    features = rows(3, 12)
    assert torch.equal(head.eval()(features), twin.eval()(features))
    before = head.assignment.clone()
    twin.assign_(torch.tensor([1, 2, 3, 4, 5]))
    assert torch.equal(head.assignment, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_moves_leave_prototypes_and_scale_in_float32(dtype):
    head = spare_head()
    prototypes = head.bank.prototypes.clone()
    head.to(dtype)
    assert torch.equal(head.bank.prototypes, prototypes)
    assert head.logit_scale.dtype == torch.float32
    assert head.projection[0].weight.dtype == dtype
    logits = head(rows(3, 12).to(dtype))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_device_moves():
    head = spare_head().to("meta")
    assert all(tensor.is_meta for tensor in [*head.parameters(), *head.buffers()])
    assert head(torch.empty(2, 12, device="meta")).shape == (2, 5)


def test_building_under_a_meta_device_context_keeps_the_bank_real():
    with torch.device("meta"):
        head = HypersphericalHead(12, 5, dim=4, projection="linear")
    assert not head.bank.prototypes.is_meta
    assert torch.equal(head.bank.prototypes, PrototypeBank(5, 4).prototypes)


@pytest.mark.parametrize("projection", ["none", "linear", "linear+bn"])
def test_autocast_computes_in_float32(projection):
    head = HypersphericalHead(8, 12, dim=8, projection=projection)
    features = rows(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = head(features)
    assert under.dtype == torch.float32
    assert torch.equal(under, head(features))


def test_non_contiguous_features():
    head = HypersphericalHead(8, 5, dim=4).eval()
    features = rows(8, 6).T
    torch.testing.assert_close(head(features), head(features.contiguous()))


@pytest.mark.parametrize(
    ("projection", "training_output"),
    in_front(product(["none", "linear+bn"], ["logits", "embedding"]), ("linear+bn", "logits")),
)
def test_compiles_as_one_graph_and_follows_the_assignment(training_output, projection):
    head = HypersphericalHead(4, 5, dim=4, projection=projection, training_output=training_output)
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(head)
    features = rows(6, 4)
    torch.testing.assert_close(compiled(features), twin(features))
    head.eval(), twin.eval()
    torch.testing.assert_close(compiled(features), twin(features))
    with torch.compiler.set_stance("fail_on_recompile"):
        head.assign_(torch.tensor([4, 3, 2, 1, 0]))
        torch.testing.assert_close(compiled(features), twin(features).flip(1))


def test_traces_and_exports():
    head = HypersphericalHead(8, 5, dim=4).eval()
    features = rows(6, 8)
    traced = torch.fx.symbolic_trace(head)
    assert torch.equal(traced(features), head(features))
    head.assign_(torch.tensor([4, 3, 2, 1, 0]))
    assert torch.equal(traced(features), head(features))
    exported = torch.export.export(head, (features,)).module()
    torch.testing.assert_close(exported(features), head(features))


def test_get_heads_sees_through_wrappers():
    head = HypersphericalHead(8, 5, dim=4)
    assert list(get_heads(head)) == [""]
    assert list(get_heads(nn.Sequential(nn.Identity(), head))) == ["1"]
    assert not get_heads(nn.Linear(2, 2))


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"dim": 1}, BankError, "2"),
        ({"dim": 4, "projection": "none"}, ArgumentError, "dim == in_features"),
        ({"bank": PrototypeBank(3, 4)}, BankError, "at least 5 prototypes"),
        ({"bank": PrototypeBank(5, 4), "dim": 3}, BankError, "dimension 3"),
        ({"bank": "best"}, BankError, "best"),
        ({"projection": "mlp"}, ArgumentError, "linear"),
        ({"training_output": "features"}, ArgumentError, "^training_output must be .*embedding"),
        ({"logit_scale": 0.0}, ArgumentError, "positive"),
        ({"logit_scale": float("nan")}, ArgumentError, "finite"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(kwargs, error, words):
    with pytest.raises(error, match=words):
        HypersphericalHead(12, 5, **kwargs)


@pytest.mark.parametrize(("in_features", "num_classes"), [(0, 5), (12, 1), (12, 0)])
def test_wrong_sizes_are_refused(in_features, num_classes):
    with pytest.raises(ArgumentError, match=r"^expected (in_features .* at least 1|num_classes .* at least 2),"):
        HypersphericalHead(in_features, num_classes)


@pytest.mark.parametrize("shape", [(3, 4), (3, 6), (5,), (3, 5, 1)])
def test_embeddings_are_recovered_from_logits_of_all_classes_only(shape):
    with pytest.raises(ShapeError, match=r"logits of shape \(B, 5\)"):
        spare_head().recover_embeddings(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 11), (12,), (3, 12, 1)])
def test_features_of_another_width_are_refused(shape):
    with pytest.raises(ShapeError, match=r"\(B, \.\.\., 12\)"):
        spare_head()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        (torch.tensor([0, 1, 2, 3, 3]), r"more than once: \[3\]"),
        (torch.tensor([0, 1, 2, 3, 8]), "from 0 to 8"),
        (torch.tensor([-1, 1, 2, 3, 4]), "from -1 to 4"),
        (torch.arange(4), r"\(5,\)"),
        (torch.arange(5) + 0.5, "int64|no whole numbers"),
    ],
)
def test_invalid_assignments_are_refused_and_change_nothing(assignment, words):
    head = spare_head()
    before = head.assignment.clone()
    with pytest.raises(AssignmentError, match=words):
        head.assign_(assignment)
    assert torch.equal(head.assignment, before)
    state = head.state_dict() | {"assignment": assignment}
    with pytest.raises(AssignmentError, match=words):
        head.load_state_dict(state)
    assert torch.equal(head.assignment, before)
    check_assignment(head)


def test_a_checkpoint_of_another_bank_shape_is_refused():
    with pytest.raises(BankError, match=r"\(8, 4\).*\(8, 6\)"):
        HypersphericalHead(12, 5, bank=PrototypeBank(8, 6)).load_state_dict(spare_head().state_dict())


@given(seed=SEEDS, num_prototypes=st.integers(3, 9), spare=st.integers(0, 3))
def test_anchors_depend_on_what_is_assigned_and_not_to_whom(seed, num_prototypes, spare):
    bank = PrototypeBank(num_prototypes + spare, 4, method="random", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_prototypes + spare, generator=generator)[:num_prototypes]
    heads = [HypersphericalHead(4, num_prototypes, bank=bank, projection="none") for _ in range(2)]
    for head in heads:
        head.assign_(chosen[torch.randperm(num_prototypes, generator=generator)])
    assert torch.equal(heads[0].anchors, heads[1].anchors)
    assert torch.equal(heads[0].anchor_inverse, heads[1].anchor_inverse)


@pytest.mark.parametrize(
    "angles",
    [[0.0, 0.6, 2.0, 3.5], [0.0, 0.35, 0.7, 3.0], [0.0, 0.01, 3.0, 3.01], [0.0, 0.3, 0.35, 1.5]],
    ids=["wide", "narrow", "floor", "mixed"],
)
def test_the_default_scale_is_the_documented_formula(angles):
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cosines = rows @ rows.T
    rho = cosines[~np.eye(4, dtype=bool)].mean()
    placed = np.log(3 * 0.99 / 0.01) / max(1.0 - rho, 0.05)
    expected = min(placed, np.sqrt(2) * max(1.0, placed / np.sqrt(3)))
    head = HypersphericalHead(2, 4, bank=PrototypeBank.from_tensor(torch.tensor(rows)), projection="none")
    assert float(head.logit_scale) == pytest.approx(expected, rel=1e-4)
