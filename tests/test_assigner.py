"""The assigner: class means, the assignment step, and what happens to bad input."""

import copy
import io
import pickle
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    AssignmentError,
    BalancedLoss,
    BankError,
    DynamicAssigner,
    HeadNotFoundError,
    HyperprotoError,
    HypersphericalHead,
    LabelError,
    PrototypeBank,
    ShapeError,
    fit_head,
    running_means,
)
from hyperproto.functional import solve_assignment
from hyperproto.targets import Target
from hyperproto.testing import SEEDS, check_assignment, check_optimal, heads, label_streams


def unit_rows(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def logits_of(head: HypersphericalHead, embeddings: torch.Tensor) -> torch.Tensor:
    return head.logit_scale * embeddings @ head.class_prototypes.T


def published_update(means: np.ndarray, embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The update of the published code: q += 0.9 q + 0.1 x, then normalise; the last sample of a label wins."""
    means = means.copy()
    for x, label in zip(embeddings, labels, strict=True):
        q = means[label] + 0.9 * means[label] + 0.1 * x
        means[label] = q / np.linalg.norm(q)
    return means


# Class means


@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_momentum_of_the_published_code_is_095(training_output):
    head = HypersphericalHead(6, 10, dim=6, bank="orthoplex", projection="none", training_output=training_output)
    assigner = DynamicAssigner(head, momentum=0.95)
    expected = np.zeros((10, 6))
    for seed in range(5):
        labels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:7]  # none twice
        embeddings = unit_rows(7, 6, seed)
        assigner.update(embeddings if training_output == "embedding" else logits_of(head, embeddings), labels)
        expected = published_update(expected, embeddings.double().numpy(), labels.numpy())
    np.testing.assert_allclose(assigner.class_means.numpy(), expected, atol=1e-5)


@given(head=heads(), data=st.data(), seed=SEEDS)
def test_without_momentum_means_are_plain_means(head, data, seed):
    batches = data.draw(label_streams(head.num_classes))
    assigner = DynamicAssigner(head, momentum=None)
    everything = [unit_rows(len(labels), head.dim, seed + number) for number, labels in enumerate(batches)]
    for embeddings, labels in zip(everything, batches, strict=True):
        _update_with_embeddings(assigner, embeddings, labels)
    sums = np.zeros((head.num_classes, head.dim))
    for embeddings, labels in zip(everything, batches, strict=True):
        np.add.at(sums, labels.numpy(), embeddings.double().numpy())
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    expected = np.divide(sums, lengths, where=lengths > 0, out=np.zeros_like(sums))
    tolerances = 2e-6 / np.clip(lengths, 1e-3, None)
    assert (np.abs(assigner.class_means.numpy() - expected) <= tolerances + 1e-6).all()
    counts = np.bincount(torch.cat([torch.empty(0, dtype=torch.int64), *batches]).numpy(), minlength=head.num_classes)
    np.testing.assert_array_equal(assigner.class_counts.numpy(), counts)


def _update_with_embeddings(assigner: DynamicAssigner, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
    """Feed embeddings themselves, also where C = D makes their width that of logits."""
    if assigner.head.num_classes == assigner.head.dim:
        assigner.feed(
            assigner.head._readout(embeddings, is_embedding=True), Target(labels, torch.ones_like(labels) > 0, -100)
        )
    else:
        assigner.update(embeddings, labels)


def test_plain_means_start_again_after_a_step():
    head = HypersphericalHead(4, 8, projection="none", dim=4)
    assigner = DynamicAssigner(head, momentum=None)
    labels = torch.arange(8)
    assigner.update(unit_rows(8, 4, 0), labels)
    assigner.step()
    second = unit_rows(8, 4, 1)
    assigner.update(second, labels)
    torch.testing.assert_close(assigner.class_means, second)
    assert assigner.class_counts.tolist() == [2.0] * 8


@pytest.mark.filterwarnings("ignore:training_output:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize(
    ("num_classes", "num_prototypes", "dim"), [(6, 6, 5), (6, 9, 10), (10, 10, 5), (20, 24, 12), (12, 12, 12)]
)
def test_means_from_logits_equal_means_from_embeddings(num_classes, num_prototypes, dim, momentum):
    bank = PrototypeBank(num_prototypes, dim)
    from_logits, from_embeddings = (
        DynamicAssigner(
            HypersphericalHead(dim, num_classes, bank=bank, projection="none", training_output=output),
            momentum=momentum,
        )
        for output in ("logits", "embedding")
    )
    order = torch.randperm(num_prototypes)[:num_classes]
    for assigner in (from_logits, from_embeddings):
        assigner.head.assign_(order)
    frame = from_logits.head.class_prototypes
    for seed in range(4):
        labels = torch.randint(num_classes, (9,))
        inside = unit_rows(9, num_classes, seed) @ frame  # C < D: what no prototype sees is in no logit
        embeddings = inside / inside.norm(dim=1, keepdim=True)
        from_embeddings.update(embeddings, labels)
        from_logits.update(logits_of(from_logits.head, embeddings), labels)
    torch.testing.assert_close(from_logits.class_means, from_embeddings.class_means, atol=1e-5, rtol=0)


def test_repeated_labels_count_with_their_mean():
    assigner = DynamicAssigner(HypersphericalHead(3, 4, projection="none"), momentum=0.5)
    x = unit_rows(4, 3)
    assigner.update(x, torch.tensor([2, 2, 0, 2]))
    expected = x[[0, 1, 3]].mean(dim=0)
    torch.testing.assert_close(assigner.class_means[2], expected / expected.norm())
    torch.testing.assert_close(assigner.class_means[0], x[2])
    assert not assigner.class_means[[1, 3]].any()


@given(head=heads(), data=st.data(), seed=SEEDS, momentum=st.sampled_from([None, 0.0, 0.9]))
def test_one_hot_soft_targets_are_hard_labels(head, data, seed, momentum):
    hard, soft = DynamicAssigner(head, momentum=momentum), DynamicAssigner(head, momentum=momentum)
    for number, labels in enumerate(data.draw(label_streams(head.num_classes))):
        logits = logits_of(head, unit_rows(len(labels), head.dim, seed + number))
        hard.update(logits, labels)
        soft.update(logits, nn.functional.one_hot(labels, head.num_classes).float())
    # Opposite embeddings may cancel to a mean without direction: leave such means out.
    clear = (hard.class_means - soft.class_means).abs().amax(dim=1) < 1e-3
    torch.testing.assert_close(hard.class_means[clear], soft.class_means[clear], atol=1e-3, rtol=0)
    assert int((~clear).sum()) <= 1
    assert torch.equal(hard.class_counts, soft.class_counts)


def test_soft_targets_weigh_the_sums():
    assigner = DynamicAssigner(HypersphericalHead(3, 4, projection="none"), momentum=None)
    x, t = unit_rows(6, 3), torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    assigner.update(x, t)
    # What a row gives to all labels alike says nothing about any of them.
    weights = (t - t.min(dim=1, keepdim=True).values).double().numpy()
    expected = weights.T @ x.double().numpy()
    np.testing.assert_allclose(assigner.class_counts.numpy(), weights.sum(axis=0), atol=1e-6)
    np.testing.assert_allclose(
        assigner.class_means.numpy(), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6
    )


def test_a_sliver_of_a_soft_label_moves_its_mean_by_a_sliver():
    assigner = DynamicAssigner(HypersphericalHead(3, 4, projection="none"), momentum=0.9)
    first = unit_rows(4, 3)
    assigner.update(first, torch.arange(4))
    smoothed = torch.full((1, 4), 0.001) + torch.tensor([[0.996, 0, 0, 0]])
    assigner.update(unit_rows(1, 3, 5), smoothed)
    assert float((assigner.class_means[1:] - first[1:]).norm(dim=1).max()) < 1e-3


def test_update_is_kept_out_of_autograd_and_changes_no_input():
    head = HypersphericalHead(4, 6, dim=4, projection="none")
    logits, labels = head(unit_rows(5, 4)).requires_grad_(), torch.tensor([0, 1, 2, 3, 3])
    before = logits.detach().clone()
    DynamicAssigner(head).update(logits, labels)
    assert torch.equal(logits, before)
    assert logits.grad is None


def test_two_forwards_before_two_losses():
    head = HypersphericalHead(4, 6, dim=4, projection="none")
    together, apart = DynamicAssigner(head), DynamicAssigner(head)
    batches = [(unit_rows(5, 4, seed), torch.randint(6, (5,))) for seed in (1, 2)]
    outputs = [head(features) for features, _ in batches]
    for output, (_, labels) in zip(outputs, batches, strict=True):
        together.update(output, labels)
    for features, labels in batches:
        apart.update(head(features), labels)
    assert torch.equal(together.class_means, apart.class_means)


# The assignment step


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
@given(head=heads(), data=st.data(), seed=SEEDS, momentum=st.sampled_from([None, 0.0, 0.9]))
def test_assignment_stays_injective_and_similarity_never_falls(head, data, seed, momentum):
    assigner = DynamicAssigner(head, momentum=momentum)
    steps = []
    for number, labels in enumerate(data.draw(label_streams(head.num_classes))):
        assigner.update(logits_of(head, unit_rows(len(labels), head.dim, seed + number)), labels)
        before = head.assignment.clone()
        step = assigner.step()
        check_assignment(head)
        assert step.similarity_after >= step.similarity_before
        assert step.moved_labels == tuple(torch.nonzero(head.assignment != before).flatten().tolist())
        assert step.changed == len(step.moved_labels)
        check_optimal(head.assignment, assigner.class_means, head.bank.prototypes)
        again = assigner.step()
        assert again.changed == 0  # nothing new seen, nothing to gain
        steps += [step, again]
    assert assigner.history == tuple(steps)


@given(seed=SEEDS, num_prototypes=st.integers(2, 7), data=st.data())
def test_solution_equals_brute_force(seed, num_prototypes, data):
    num_classes = data.draw(st.integers(2, num_prototypes))
    means, prototypes = unit_rows(num_classes, 4, seed), unit_rows(num_prototypes, 4, seed + 1)
    solution = solve_assignment(means, prototypes)
    check_optimal(solution.assignment, means, prototypes, tolerance=1e-9)
    chosen = (means.double() * prototypes[solution.assignment].double()).sum()
    assert solution.similarity == pytest.approx(float(chosen), abs=1e-6)
    assert solution.optimal
    assert solution.method == "dense"


@given(head=heads(), seed=SEEDS)
def test_relabelling_classes_permutes_means_and_assignment(head, seed):
    order = torch.randperm(head.num_classes, generator=torch.Generator().manual_seed(seed))
    embeddings = unit_rows(4 * head.num_classes, head.dim, seed)
    labels = torch.arange(4 * head.num_classes) % head.num_classes
    relabelled = copy.deepcopy(head)
    relabelled.assign_(head.assignment[order.argsort()].clone())  # label order[k] is the old label k
    plain, other = DynamicAssigner(head), DynamicAssigner(relabelled)
    plain.update(logits_of(head, embeddings), labels)
    other.update(logits_of(relabelled, embeddings), order[labels])
    torch.testing.assert_close(other.class_means[order], plain.class_means, atol=1e-3, rtol=0)
    after = plain.step().similarity_after
    assert other.step().similarity_after == pytest.approx(after, abs=1e-3)


def test_weights_decide_who_gets_a_contested_prototype():
    means = torch.tensor([[1.0, 0.0], [1.0, 0.05]])
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert solve_assignment(means, prototypes).assignment.tolist() == [0, 1]
    heavy = solve_assignment(means, prototypes, weights=torch.tensor([0.01, 1.0]))
    assert heavy.assignment.tolist() == [1, 0]


def test_labels_never_seen_keep_their_prototype_unless_a_seen_one_needs_it():
    head = HypersphericalHead(4, 8, dim=4, bank="orthoplex", projection="none")
    head.assign_(torch.tensor([3, 1, 4, 0, 5, 2, 7, 6]))
    assigner = DynamicAssigner(head)
    wanted = head.bank.prototypes[[1]]  # label 0 wants what label 1, never seen, has
    assigner.update(wanted, torch.tensor([0]))
    step = assigner.step()
    assert head.assignment.tolist() == [1, 3, 4, 0, 5, 2, 7, 6]
    assert step.moved_labels == (0, 1)
    assert step.unseen == tuple(range(1, 8))


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
def test_nothing_seen_moves_nothing():
    head = HypersphericalHead(4, 8, dim=4, projection="none")
    head.assign_(torch.tensor([3, 1, 4, 0, 5, 2, 7, 6]))
    step = DynamicAssigner(head).step()
    assert (step.changed, step.unseen) == (0, tuple(range(8)))
    assert head.assignment.tolist() == [3, 1, 4, 0, 5, 2, 7, 6]


def test_ties_move_nothing():
    prototypes = torch.eye(4)
    means = torch.ones(4, 4)
    current = torch.tensor([2, 0, 3, 1])
    assert torch.equal(solve_assignment(means, prototypes, current=current).assignment, current)


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
def test_a_simplex_says_that_no_step_changes_the_geometry():
    simplex = HypersphericalHead(8, 5, projection="none")
    assert DynamicAssigner(simplex).step().equiangular
    assert "simplex" in str(DynamicAssigner(simplex).step())
    assert not DynamicAssigner(HypersphericalHead(4, 8, projection="none")).step().equiangular
    spare = HypersphericalHead(8, 5, bank=PrototypeBank(9, 8), projection="none")
    assert DynamicAssigner(spare).step().equiangular


def test_a_step_tells_what_it_did_in_one_line():
    assigner = DynamicAssigner(HypersphericalHead(8, 5, projection="none"))
    assigner.update(unit_rows(3, 8), torch.arange(3))
    step = assigner.step()
    numbers = f"similarity {step.similarity_before:.4f} -> {step.similarity_after:.4f}"
    rest = "2 labels not seen yet; the prototypes form a simplex: no assignment changes the geometry between classes"
    told = rf"{step.changed} labels moved, {numbers} \(dense, optimal, \d+\.\d\d\d s\); {rest}"
    assert re.fullmatch(told, str(step))


def test_freezing():
    head = HypersphericalHead(4, 8, dim=4, projection="none")
    assigner = DynamicAssigner(head)
    assigner.update(unit_rows(8, 4), torch.arange(8))
    assigner.freeze()
    assert (assigner.step().changed, assigner.step().solver) == (0, "frozen")
    restored = DynamicAssigner(head)
    restored.load_state_dict(assigner.state_dict())
    assert restored.step().solver == "frozen"
    assigner.unfreeze()
    assert assigner.step().changed > 0
    assert [step.solver for step in assigner.history] == ["frozen", "frozen", "dense"]


def test_several_heads_of_one_model_share_the_assignment():
    bank = PrototypeBank(8, 4)
    model = nn.ModuleList(HypersphericalHead(width, 8, bank=bank) for width in (6, 10))
    assigner = DynamicAssigner(model)
    assigner.update(unit_rows(8, 4), torch.arange(8))
    assigner.step()
    assert torch.equal(model[0].assignment, model[1].assignment)
    model[0].assign_(torch.arange(8))
    with pytest.raises(BankError, match="one bank and one assignment"):
        DynamicAssigner(model)


# Life


def test_state_dict_resumes_exactly():
    head = HypersphericalHead(4, 8, dim=4, projection="none")
    batches = [(unit_rows(6, 4, seed), torch.randint(8, (6,))) for seed in range(6)]
    for momentum in (0.9, None):
        undisturbed = DynamicAssigner(copy.deepcopy(head), momentum=momentum)
        first = DynamicAssigner(copy.deepcopy(head), momentum=momentum)
        for batch in batches[:3]:
            undisturbed.update(*batch)
            first.update(*batch)
        resumed = DynamicAssigner(copy.deepcopy(head), momentum=momentum)
        resumed.head.load_state_dict(first.head.state_dict())
        resumed.load_state_dict(first.state_dict())
        for batch in batches[3:]:
            undisturbed.update(*batch)
            resumed.update(*batch)
        assert undisturbed.step().moved_labels == resumed.step().moved_labels
        for name, value in undisturbed.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_other_shape_is_refused():
    small, large = (DynamicAssigner(HypersphericalHead(4, num, projection="none")) for num in (6, 8))
    with pytest.raises(ShapeError, match=r"\(6, 4\).*\(8, 4\)"):
        large.load_state_dict(small.state_dict())


def test_copying_a_model_with_its_assigner_keeps_them_together():
    head = HypersphericalHead(4, 8, dim=4, projection="none")
    twin_head, twin = copy.deepcopy((head, DynamicAssigner(head)))
    assert twin.head is twin_head
    head_again, assigner_again = pickle.loads(pickle.dumps((twin_head, twin)))
    assert assigner_again.head is head_again


def test_the_assigner_does_not_hold_the_model():
    head = HypersphericalHead(8, 6, dim=4)
    assigner = DynamicAssigner(head)
    assert not list(assigner.parameters())
    assert set(assigner.state_dict()) == {
        "class_means",
        "class_counts",
        "combined_counts",
        "format_version",
        "pending_counts",
        "frozen",
    }
    assert not list(BalancedLoss(assigner).parameters())


def test_half_precision_moves_leave_the_means_alone():
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"))
    assigner.half()
    assert assigner.class_means.dtype == torch.float32
    assigner.update(unit_rows(6, 4).half(), torch.arange(6))
    assert torch.isfinite(assigner.class_means).all()


def test_autocast_leaves_the_means_alone():
    head = HypersphericalHead(16, 20, projection="none")
    inside, outside = DynamicAssigner(head), DynamicAssigner(head)
    logits, labels = head(unit_rows(30, 16)), torch.randint(20, (30,))
    outside.update(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.update(logits, labels)
    assert torch.equal(inside.class_means, outside.class_means)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_update_compiles_as_one_graph(momentum):
    head = HypersphericalHead(4, 6, dim=4, projection="none")
    eager, compiled = DynamicAssigner(head, momentum=momentum), DynamicAssigner(head, momentum=momentum)
    torch.compiler.reset()
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        logits, labels = head(unit_rows(7, 4, seed)), torch.randint(6, (7,))
        eager.update(logits, labels)
        update(logits, labels)
    torch.testing.assert_close(compiled.class_means, eager.class_means)


def test_batches_of_one_sample_of_one_class_and_of_none():
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"))
    assigner.update(unit_rows(1, 4), torch.tensor([3]))
    assigner.update(unit_rows(5, 4), torch.full((5,), 2))
    before = assigner.class_means.clone()
    assigner.update(unit_rows(0, 4), torch.empty(0, dtype=torch.int64))
    assert torch.equal(assigner.class_means, before)
    assert assigner.class_counts.tolist() == [0, 0, 5, 1, 0, 0]


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_counts_go_on_where_float32_cannot_count(momentum, soft):
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"), momentum=momentum)
    state = copy.deepcopy(assigner.state_dict())
    for name in ("class_counts", "combined_counts"):
        state[name].fill_(2.0**24)
    assigner.load_state_dict(state)
    target = nn.functional.one_hot(torch.arange(6), 6).float() if soft else torch.arange(6)
    for turn in range(1, 4):
        assigner.update(unit_rows(6, 4, turn), target)
        assert assigner.class_counts.tolist() == [2**24 + turn] * 6
        assigner.step()
        assert assigner.class_counts.tolist() == assigner.combined_counts.tolist() == [2**24 + turn] * 6
    state["pending_counts"].fill_(2.0**24)
    assigner.load_state_dict(state)
    assigner.update(unit_rows(6, 4), target)
    assert assigner.pending_counts.tolist() == [2**24 + 1] * 6


def test_zero_embeddings_say_nothing():
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"))
    assigner.update(torch.zeros(2, 6), torch.tensor([1, 1]))
    assert not assigner.class_means.any()
    assert assigner.step().changed == 0


# Bad input


@pytest.mark.parametrize(
    ("output", "target", "error", "words"),
    [
        (torch.zeros(3, 6), torch.tensor([0, 6, 1]), LabelError, r"\[0, 5\].*from 0 to 6"),
        (torch.zeros(3, 6), torch.tensor([0, -1, 1]), LabelError, "from -1 to 1"),
        (torch.zeros(3, 6), torch.tensor([0, 1, 1], dtype=torch.int32), LabelError, r"target\.long"),
        (torch.zeros(3, 6), torch.tensor([0.0, 1.0, 1.0]), LabelError, "int64"),
        (torch.zeros(3, 6), torch.zeros(3, 5), LabelError, r"\(B, 6\)"),
        (torch.zeros(3, 6), torch.zeros(3, 6, dtype=torch.int64), LabelError, "floating"),
        (torch.zeros(3, 6), torch.tensor([0, 1]), ShapeError, "3 samples"),
        (torch.zeros(3, 7), torch.tensor([0, 1, 1]), ShapeError, r"\(B, 6\).*\(B, 4\)"),
        (torch.zeros(3), torch.tensor([0, 1, 1]), ShapeError, r"\(3,\)"),
        ((torch.zeros(3, 6), torch.zeros(3, 6)), torch.tensor([0, 1, 1]), ShapeError, "tuple"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(output, target, error, words):
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"))
    assigner.update(unit_rows(6, 4), torch.arange(6))
    before = copy.deepcopy(assigner.state_dict())
    criterion = BalancedLoss(assigner)
    for call in (assigner.update, criterion):
        with pytest.raises(error, match=words):
            call(output, target)
    for name, value in assigner.state_dict().items():
        assert torch.equal(value, before[name])


def _non_finite_rows() -> torch.Tensor:
    features = unit_rows(3, 4)
    features[1] = float("nan")
    features[2, 0] = float("inf")
    return features


@pytest.mark.filterwarnings("ignore:.*samples since the last step:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_few_features_that_are_not_finite_leave_no_trace(momentum, soft):
    assigner, other = (
        DynamicAssigner(HypersphericalHead(4, 6, dim=4, projection="none"), momentum=momentum) for _ in range(2)
    )
    features, labels = _non_finite_rows(), torch.tensor([0, 3, 5])
    for each in (assigner, other):
        each.update(each.head(unit_rows(6, 4)), torch.arange(6))
    target = torch.nn.functional.one_hot(labels, 6).float() if soft else labels
    assigner.update(assigner.head(features), target)
    other.update(other.head(features[:1]), target[:1])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(assigner.state_dict()[name], value, msg=name)
    assert assigner.step().unseen == ()


@pytest.mark.parametrize("momentum", [0.9, None])
def test_non_finite_features_are_named_at_step_where_most_are(momentum):
    head = HypersphericalHead(4, 6, dim=4, projection="none")
    assigner = DynamicAssigner(head, momentum=momentum)
    assigner.update(unit_rows(6, 4), torch.arange(6))
    assigner.step()
    assigner.update(head(_non_finite_rows()), torch.tensor([0, 3, 5]))
    before, means = head.assignment.clone(), assigner.class_means.clone()
    with pytest.raises(AssignmentError, match=r"2 labels are not finite: \[3, 5\]"):
        assigner.step()
    assert torch.equal(head.assignment, before)
    assert torch.equal(assigner.class_means, means)
    assert torch.isfinite(means).all()
    assert len(assigner.history) == 1
    # What the message advises works.
    assigner.forget([3, 5])
    assert assigner.step().unseen == (3, 5)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"prototypes": torch.randn(2, 4)}, AssignmentError, "at least as many"),
        ({"prototypes": torch.randn(6, 3)}, ShapeError, r"\(5, 4\) and \(6, 3\)"),
        ({"prototypes": torch.full((6, 4), float("nan"))}, AssignmentError, "prototypes must be finite; rows"),
        ({"class_means": torch.full((5, 4), float("inf"))}, AssignmentError, "class means must be finite"),
        ({"current": torch.tensor([0, 1, 2, 3, 3])}, AssignmentError, "more than once"),
        ({"current": torch.tensor([0, 1, 2, 3, 9])}, AssignmentError, "from 0 to 9"),
        ({"class_means": torch.zeros(0, 4), "current": None}, AssignmentError, "at least one label"),
        ({"weights": torch.ones(4)}, ShapeError, r"\(5,\)"),
        ({"weights": -torch.ones(5)}, ArgumentError, "not negative"),
        ({"method": "greedy"}, ArgumentError, "^method must be .*, got 'greedy'"),
        ({"class_means": torch.randn(4)}, ShapeError, r"class means of shape \(C, D\)"),
        ({"prototypes": torch.randn(4)}, ShapeError, r"prototypes of shape \(P, D\)"),
        ({"prototypes": torch.zeros(0, 4)}, AssignmentError, "at least as many"),
        ({"class_means": torch.randn(5, 4, device="meta")}, ShapeError, "expected class means with values"),
        ({"prototypes": torch.randn(6, 4, device="meta")}, ShapeError, "expected prototypes with values"),
        ({"weights": torch.ones(5, device="meta")}, ShapeError, "expected weights with values"),
        ({"prices": torch.zeros(6, device="meta")}, ShapeError, "expected prices with values"),
    ],
)
def test_bad_problems_are_refused(kwargs, error, words):
    problem = {"class_means": torch.randn(5, 4), "prototypes": torch.randn(6, 4)} | kwargs
    with pytest.raises(error, match=words):
        solve_assignment(problem.pop("class_means"), problem.pop("prototypes"), **problem)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_step_that_fails_leaves_what_was_seen(momentum, monkeypatch):
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"), momentum=momentum)
    assigner.update(unit_rows(6, 4), torch.arange(6))
    before = copy.deepcopy(assigner.state_dict())

    def out_of_memory(*args: object, **options: object) -> None:
        raise AssignmentError("did not close")

    monkeypatch.setattr("hyperproto.assigner.solve_assignment", out_of_memory)
    with pytest.raises(AssignmentError, match="did not close"):
        assigner.step()
    for name, value in assigner.state_dict().items():
        assert torch.equal(value, before[name]), name
    monkeypatch.undo()
    assert assigner.step().unseen == ()


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_batch_leaves_the_means_of_labels_that_it_lacks_as_they_were(momentum, soft):
    assigner = DynamicAssigner(HypersphericalHead(16, 64, dim=16, projection="none"), momentum=momentum)
    assigner.update(unit_rows(64, 16), torch.arange(64))
    before = assigner.class_means.clone()
    target = torch.tensor([3, 3, 7])
    assigner.update(unit_rows(3, 16, seed=1), nn.functional.one_hot(target, 64).float() if soft else target)
    others = [label for label in range(64) if label not in (3, 7)]
    assert torch.equal(assigner.class_means[others], before[others])
    assert not torch.equal(assigner.class_means[[3, 7]], before[[3, 7]])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_means_stay_where_buffers_are_replaced_by_equal_ones(momentum):
    """As packages do that keep buffers in memory of their own."""
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"), momentum=momentum)
    assigner.update(unit_rows(6, 4), torch.arange(6))
    assigner.class_means[2] = float("nan")
    before = copy.deepcopy(assigner.state_dict())
    assigner._apply(torch.clone)
    for name, value in assigner.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_a_rank_takes_from_a_checkpoint_what_it_has_fed_itself(writers, momentum, monkeypatch):
    """As the first of two ranks: what the second alone has fed since the last step is left to it."""
    monkeypatch.setattr(running_means, "has_ranks", lambda group: True)
    monkeypatch.setattr(running_means, "bit_of_this_rank", lambda group: 1)
    saved, loaded = (DynamicAssigner(HypersphericalHead(4, 6, projection="none"), momentum=momentum) for _ in range(2))
    saved.update(unit_rows(6, 4), torch.arange(6))
    saved.step()
    saved.update(unit_rows(2, 4, seed=1), torch.arange(2))
    saved.writers.fill_(writers)
    loaded.load_state_dict(saved.state_dict())
    kept = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] if writers & 1 else [0.0] * 6
    assert loaded.pending_counts.tolist() == kept
    assert loaded.class_counts.tolist() == [1.0 + count for count in kept]
    assert int(loaded.writers) == (writers if writers & 1 else 0)


def test_an_unknown_solver_is_refused_before_the_first_epoch():
    with pytest.raises(ArgumentError, match=r"solver must be one of .*'hungarian'"):
        DynamicAssigner(HypersphericalHead(4, 6), solver="hungarian")


@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_small_weights_weigh_as_large_ones(method):
    means, weights = torch.tensor([[0.0, 1.0], [1.0, 0.1]]), 1e-12 * torch.ones(2)
    solution = solve_assignment(means, torch.eye(2), weights=weights, method=method)
    assert solution.assignment.tolist() == [1, 0]


@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_the_weight_of_a_label_never_seen_does_not_count(method):
    means, weights = unit_rows(20, 6), torch.ones(20)
    means[0], weights[0] = 0.0, 1e12
    prototypes = unit_rows(20, 6, seed=1)
    solution = solve_assignment(means, prototypes, weights=weights, method=method)
    check_optimal(solution.assignment, means, prototypes)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_is_not_asked_for(solver, dtype):
    features, labels = torch.randn(12, 4, dtype=torch.float32), torch.arange(12) % 6
    steps = []
    before = torch.get_default_dtype()
    for default in (before, dtype):
        torch.set_default_dtype(default)
        try:
            head = HypersphericalHead(4, 6, dim=3, projection="linear+bn").float()
            assigner = DynamicAssigner(head, solver=solver)
            assigner.update(head(features), labels)
            steps.append(assigner.step().moved_labels)
        finally:
            torch.set_default_dtype(before)
        assert head.eval()(features).dtype == torch.float32
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [([0, 0, 0], "more than once"), ([0, 1, 7], "values from 0 to 7"), ([0, 2, 1], "is possible")],
)
def test_the_check_of_a_solver_sees_what_is_no_assignment(assignment, words):
    with pytest.raises(AssertionError, match=words):
        check_optimal(torch.tensor(assignment), torch.eye(3), torch.eye(4, 3).abs())


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_a_default_device_is_not_asked_for(solver):
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"), solver=solver)
    assigner.update(unit_rows(6, 4), torch.arange(6))
    twin = copy.deepcopy(assigner)
    with torch.device("meta"):
        step = assigner.step()
    assert step.moved_labels == twin.step().moved_labels


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ArgumentError, match="weight of the old mean"):
        DynamicAssigner(HypersphericalHead(4, 6), momentum=momentum)


def test_a_source_without_a_head_is_refused():
    for user in (DynamicAssigner, BalancedLoss):
        with pytest.raises(HeadNotFoundError, match="convert_model"):
            user(nn.Linear(4, 4))


def test_all_errors_are_ours_and_value_errors():
    for error in (ArgumentError, AssignmentError, BankError, HeadNotFoundError, LabelError, ShapeError):
        assert issubclass(error, HyperprotoError)
        assert issubclass(error, ValueError)


# What a step says


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
def test_a_simplex_is_known_by_its_angles_and_not_by_its_name():
    corners = PrototypeBank(5, 4, method="simplex").prototypes
    head = HypersphericalHead(4, 5, bank=PrototypeBank.from_tensor(corners @ torch.eye(4).flip(0)), projection="none")
    assert DynamicAssigner(head).step().equiangular
    moved = corners + 0.01 * unit_rows(5, 4)
    head = HypersphericalHead(4, 5, bank=PrototypeBank.from_tensor(moved), projection="none")
    assert not DynamicAssigner(head).step().equiangular


@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
def test_a_step_says_how_long_it_took():
    assigner = DynamicAssigner(HypersphericalHead(4, 6, dim=4, projection="none"))
    started = time.perf_counter()
    step = assigner.step()
    assert 0.0 < step.seconds <= time.perf_counter() - started


@pytest.mark.parametrize("difference", [1e-6, 1e-2])
def test_banks_that_nearly_agree_are_not_shared(difference):
    rows = unit_rows(6, 4).double()
    near = torch.nn.functional.normalize(rows + difference * unit_rows(6, 4, seed=1))
    banks = [PrototypeBank.from_tensor(each) for each in (rows, near)]
    assert not torch.equal(banks[0].prototypes, banks[1].prototypes)
    heads = nn.ModuleList([HypersphericalHead(4, 6, bank=bank, projection="none") for bank in banks])
    with pytest.raises(BankError, match="must share one bank"):
        DynamicAssigner(heads)


def test_the_record_of_a_step_takes_two_bits_a_label():
    head = HypersphericalHead(4, 2000, dim=4, projection="none", bank="random")
    assigner = DynamicAssigner(head)
    assigner.update(head.bank.prototypes[:1500].flip(0), torch.arange(1500))
    sizes = [len(pickle.dumps(assigner.history))]
    before = head.assignment.clone()
    step = assigner.step()
    sizes.append(len(pickle.dumps(assigner.history)))
    assert step.unseen == tuple(range(1500, 2000))
    assert step.moved_labels == tuple(torch.nonzero(head.assignment != before).flatten().tolist()) != ()
    assert sizes[1] - sizes[0] < 2 * 2000 / 8 + 1000
    assert copy.deepcopy(step) == step


def test_the_history_ends_somewhere():
    assigner = DynamicAssigner(HypersphericalHead(4, 6, projection="none"))
    assigner.update(unit_rows(6, 4), torch.arange(6))
    steps = [assigner.step() for _ in range(1003)]
    assert assigner.history == tuple(steps[3:])


def test_reports_load_beside_the_weights_of_a_checkpoint():
    head = HypersphericalHead(4, 3, dim=4)
    assigner = DynamicAssigner(head)
    features, labels = torch.randn(30, 4), torch.arange(30) % 3
    assigner.update(head(features), labels)
    reports = [assigner.step(), assigner.history, fit_head(head, [(features, labels)]), head.bank.report()]
    file = io.BytesIO()
    torch.save(reports, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == reports
