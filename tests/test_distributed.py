"""Several ranks: one assignment and the same means on each of them (gloo on the CPU)."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compatible import SYNC_BUFFERS, needs
from ranks import run_on_ranks
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import normalize

from hyperproto import (
    ArgumentError,
    AssignmentError,
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    LabelError,
    PrototypeBank,
)
from hyperproto.testing import check_optimal

NUM_CLASSES, DIM = 7, 3
MOMENTA = pytest.mark.parametrize("momentum", [None, 0.9])

Batch = tuple[torch.Tensor, torch.Tensor]


def make_assigner(momentum: float | None, **options: object) -> DynamicAssigner:
    bank = PrototypeBank(NUM_CLASSES, DIM, method="random")
    head = HypersphericalHead(DIM, NUM_CLASSES, bank=bank, projection="none", training_output="embedding")
    return DynamicAssigner(head, momentum=momentum, **options)


def draw_batches(rank: int, epoch: int, *, soft: bool = False) -> list[Batch]:
    """Ragged batches, none of some labels, and of some ranks and epochs no batch or an empty one."""
    generator = torch.Generator().manual_seed(100 * epoch + rank)
    count = int(torch.randint(4, (), generator=generator))
    batches = []
    for size in torch.randint(7, (count,), generator=generator).tolist():
        labels = torch.randint(rank, NUM_CLASSES - 1, (size,), generator=generator)
        target = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
        share = torch.rand(size, 1, generator=generator)
        mixed = share * target + (1 - share) * target.roll(1, dims=0)
        batches.append((normalize(torch.randn(size, DIM, generator=generator)), mixed if soft else labels))
    return batches


def snapshot(assigner: DynamicAssigner) -> dict[str, torch.Tensor]:
    return {"assignment": assigner.head.assignment.clone()} | {
        name: value.clone() for name, value in assigner.state_dict().items()
    }


def all_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The rule, in NumPy


def means_of_all_batches(parts: list[list[Batch]]) -> np.ndarray:
    """Plain means, normalised, of what all ranks saw; zero for labels without a sample."""
    sums = np.zeros((NUM_CLASSES, DIM))
    for embeddings, target in (batch for batches in parts for batch in batches):
        sums += weights_of(target).T @ embeddings.double().numpy()
    return unit(sums)


def means_with_momentum(start: np.ndarray, parts: list[list[Batch]], momentum: float) -> np.ndarray:
    """Every rank moves its own means; then they are added up, weighed by the samples of each rank."""
    total, seen = np.zeros_like(start), np.zeros(NUM_CLASSES)
    for batches in parts:
        means, counts = start.copy(), np.zeros(NUM_CLASSES)
        for embeddings, target in batches:
            weights = weights_of(target)
            present = weights.sum(axis=0)
            sums = weights.T @ embeddings.double().numpy()
            for label in np.flatnonzero((present >= 0.5) | ((present > 0) & start.any(axis=1))):
                share = (1 - momentum) / max(present[label], 1.0)
                means[label] = unit(momentum * means[label] + share * sums[label])
            counts += present
        total += counts[:, None] * means
        seen += counts
    return np.where(seen[:, None] > 0, unit(total), start)


def weights_of(target: torch.Tensor) -> np.ndarray:
    return target.double().numpy() if target.dim() == 2 else np.eye(NUM_CLASSES)[target.numpy()]


def unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, where=lengths > 0, out=np.zeros_like(rows))


# One assignment, the same means


def run_epochs(rank: int, momentum: float | None, soft: bool, order: list[int], epochs: int) -> list[dict]:
    """Trains on the data of another rank, `order[rank]`, and returns the state after each epoch."""
    assigner = make_assigner(momentum)
    states = []
    for epoch in range(epochs):
        for batch in draw_batches(order[rank], epoch, soft=soft):
            assigner.update(*batch)
        step = assigner.step()
        assert torch.equal(assigner.class_counts, assigner.combined_counts)
        states.append(snapshot(assigner) | {"moved": step.moved_labels, "unseen": step.unseen})
    return states


@MOMENTA
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_state_that_the_rule_says(momentum, soft, world_size):
    epochs = 12
    results = run_on_ranks(run_epochs, world_size, momentum, soft, list(range(world_size)), epochs)
    means, counts = np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES)
    prototypes = make_assigner(momentum).head.bank.prototypes
    for epoch in range(epochs):
        states = [result[epoch] for result in results]
        for other in states[1:]:
            assert other["moved"] == states[0]["moved"]
            assert other["unseen"] == states[0]["unseen"]
            for name in ("assignment", "class_means", "class_counts", "combined_counts", "pending_counts"):
                assert torch.equal(other[name], states[0][name]), name  # bit for bit
        parts = [draw_batches(rank, epoch, soft=soft) for rank in range(world_size)]
        present = sum(weights_of(target).sum(axis=0) for batches in parts for _, target in batches)
        counts = counts + present
        if momentum is None:
            means = np.where((np.zeros(NUM_CLASSES) + present >= 0.5)[:, None], means_of_all_batches(parts), means)
        else:
            means = means_with_momentum(means, parts, momentum)
        np.testing.assert_allclose(states[0]["class_means"], means, atol=2e-5)
        np.testing.assert_allclose(states[0]["class_counts"], counts, rtol=1e-6)
        assert not states[0]["pending_counts"].any()
        check_optimal(states[0]["assignment"], states[0]["class_means"], prototypes)
    assert sum(len(state["moved"]) for state in results[0]) > 0


@MOMENTA
@pytest.mark.parametrize(("world_size", "tolerance"), [(2, 0.0), (4, 1e-6)], ids=["two", "four"])
def test_which_rank_has_which_data_does_not_matter(momentum, world_size, tolerance):
    """Two ranks: bit for bit. More: to the rounding of the sum, whose order is that of the ranks."""
    forward = run_on_ranks(run_epochs, world_size, momentum, True, list(range(world_size)), 4)[0]
    backward = run_on_ranks(run_epochs, world_size, momentum, True, list(range(world_size))[::-1], 4)[0]
    for first, second in zip(forward, backward, strict=True):
        assert torch.equal(first["assignment"], second["assignment"])
        torch.testing.assert_close(first["class_means"], second["class_means"], atol=tolerance, rtol=0)
        torch.testing.assert_close(first["class_counts"], second["class_counts"], atol=tolerance, rtol=tolerance)


# What happens outside of step(), and within it


def work_alone_then_step(rank: int) -> tuple[int, dict[str, int]]:
    """Rank 0 uses everything but step() while rank 1 does nothing: any collective in it would wait for ever."""
    assigner = make_assigner(None)
    criterion = BalancedLoss(assigner)
    with CommDebugMode() as outside:
        if rank == 0:
            features = torch.randn(5, DIM, requires_grad=True)
            criterion(assigner.head(features), torch.arange(5)).backward()
            assigner.update(assigner.head(features), torch.arange(5))
            assigner.freeze()
            assigner.unfreeze()
            other = make_assigner(None)
            other.load_state_dict(assigner.state_dict())
            other.forget([0])
            repr(assigner)
    with CommDebugMode() as inside:
        assigner.step()
    counts = {str(name).rpartition(".")[2]: count for name, count in inside.get_comm_counts().items()}
    return outside.get_total_counts(), counts


@needs("a CommDebugMode in which a module may be called twice", torch="2.14")
def test_the_collectives_of_a_step_and_none_outside():
    """What ranks must agree on; sums of means and of counts; the solution, as two, and the means of the first rank."""
    in_step = {"allgather_": 1, "allreduce_": 2, "broadcast_": 3}
    assert run_on_ranks(work_alone_then_step, 2, seconds=20) == [(0, in_step)] * 2


def step_in_pairs(rank: int) -> dict:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with pytest.raises(ArgumentError, match=f"rank {rank} belongs to"):
        make_assigner(0.9, process_group=pairs[1 - rank // 2])
    assigner = make_assigner(0.9, process_group=pairs[rank // 2])
    for batch in draw_batches(rank, epoch=1):
        assigner.update(*batch)
    if rank >= 2:  # in its own time, without the others
        assigner.step()
    dist.barrier()
    if rank < 2:
        assigner.step()
    return snapshot(assigner)


def test_a_process_group_by_argument():
    states = run_on_ranks(step_in_pairs, 4)
    assert all_equal(states[0], states[1])
    assert all_equal(states[2], states[3])
    for first in (0, 2):
        seen = sum(len(target) for rank in (first, first + 1) for _, target in draw_batches(rank, epoch=1))
        assert float(states[first]["class_counts"].sum()) == seen > 0


# Faults of one rank


def poison_one_rank(rank: int, momentum: float | None) -> dict:
    assigner = make_assigner(momentum)
    assigner.update(torch.eye(DIM), torch.arange(DIM))
    assigner.step()
    assigner.update(normalize(torch.randn(NUM_CLASSES, DIM)), torch.arange(NUM_CLASSES))
    if rank == 1:
        lost = 2 * NUM_CLASSES  # as many as both ranks have fed
        assigner.update(torch.full((lost, DIM), float("nan")), torch.full((lost,), 4))
    before = snapshot(assigner)
    with pytest.raises(AssignmentError) as failure:
        assigner.step()
    after = snapshot(assigner)
    unchanged = all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assigner.forget([4])  # as the message says
    recovered = assigner.step()
    return {"error": str(failure.value), "unchanged": unchanged, "unseen": recovered.unseen, **snapshot(assigner)}


@MOMENTA
def test_non_finite_means_of_one_rank_stop_all_and_the_advice_works(momentum):
    first, second = run_on_ranks(poison_one_rank, 2, momentum)
    assert first["error"] == second["error"]
    assert "1 labels are not finite: [4]" in first["error"]
    assert first["unchanged"]
    assert second["unchanged"]
    assert first["unseen"] == second["unseen"] == (4,)
    assert torch.isfinite(first["class_means"]).all()
    assert torch.equal(first["class_means"], second["class_means"])
    assert torch.equal(first["assignment"], second["assignment"])


def test_means_that_are_not_finite_stop_one_process_too():
    assigner = make_assigner(0.9)
    embeddings = normalize(torch.randn(NUM_CLASSES, DIM))
    assigner.update(embeddings, torch.arange(NUM_CLASSES))
    assigner.step()
    assigner.update(torch.full((1, DIM), float("nan")), torch.tensor([4]))
    with pytest.raises(AssignmentError, match=r"1 labels are not finite: \[4\]"):
        assigner.step()
    assigner.forget([4])
    assert assigner.step().unseen == (4,)
    assert torch.isfinite(assigner.class_counts).all()


def test_labels_to_forget_are_checked():
    assigner = make_assigner(None)
    assigner.update(torch.eye(DIM), torch.arange(DIM))
    before = snapshot(assigner)
    with pytest.raises(LabelError, match=r"\[0, 6\], got values from 1 to 7"):
        assigner.forget([1, 7])
    assert all_equal(snapshot(assigner), before)
    assigner.forget(torch.tensor([1]))
    assigner.forget([])
    assert torch.equal(
        assigner.class_means,
        torch.eye(DIM)[[0, 1, 2, 0, 0, 0, 0]] * torch.tensor([[1.0], [0], [1.0], [0], [0], [0], [0]]),
    )
    assert assigner.step().unseen == (1, 3, 4, 5, 6)


def wrap_the_assigner_too(rank: int, sync_buffers: bool) -> str:
    """The criterion inside of what DistributedDataParallel wraps, as in a LightningModule."""
    head = HypersphericalHead(4, NUM_CLASSES, dim=DIM, projection="linear")
    assigner = DynamicAssigner(head)
    model = torch.nn.ModuleDict({"head": head, "criterion": BalancedLoss(assigner)})
    model.forward = lambda features, labels: model["criterion"](model["head"](features), labels)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **{SYNC_BUFFERS: sync_buffers})
    for _ in range(2):
        wrapped(torch.randn(NUM_CLASSES, 4), torch.arange(NUM_CLASSES)).backward()
    before = head.assignment.clone()
    try:
        assigner.step()
    except AssignmentError as failure:
        assert torch.equal(head.assignment, before)
        return str(failure)
    return str(int(assigner.class_counts.sum()))


def test_an_assigner_whose_buffers_ddp_broadcasts_is_noticed():
    first, second = run_on_ranks(wrap_the_assigner_too, 2, True)
    assert first == second
    assert "on 1 ranks the assigner's buffers were overwritten" in first
    assert f"{SYNC_BUFFERS}=False" in first
    assert run_on_ranks(wrap_the_assigner_too, 2, False) == [str(4 * NUM_CLASSES)] * 2


def test_each_of_three_ranks_notices_for_itself():
    for message in run_on_ranks(wrap_the_assigner_too, 3, True):
        assert "on 2 ranks the assigner's buffers were overwritten" in message


def step_after_each_batch(rank: int) -> list[int]:
    """Buffers that are broadcast before each forward pass lose nothing where a step follows each."""
    head = HypersphericalHead(4, NUM_CLASSES, dim=DIM, projection="linear")
    assigner = DynamicAssigner(head)
    model = torch.nn.ModuleDict({"head": head, "criterion": BalancedLoss(assigner)})
    model.forward = lambda features, labels: model["criterion"](model["head"](features), labels)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    counts = []
    for _ in range(3):
        wrapped(torch.randn(NUM_CLASSES, 4), torch.arange(NUM_CLASSES)).backward()
        assigner.step()
        counts.append(int(assigner.class_counts.sum()))
    return counts


def test_an_assigner_that_is_broadcast_with_nothing_pending_goes_on():
    expected = [2 * NUM_CLASSES * (epoch + 1) for epoch in range(3)]
    assert run_on_ranks(step_after_each_batch, 2) == [expected] * 2


# Another number of ranks


def train_and_save(rank: int, world_size: int, epochs: range, start: dict | None, momentum: float | None) -> dict:
    """Epochs whose eight parts of data are dealt out to however many ranks there are."""
    assigner = make_assigner(momentum)
    if start is not None:
        assigner.head.load_state_dict(start["head"])
        assigner.load_state_dict(start["assigner"])
    for epoch in epochs:
        for part in range(rank, 8, world_size):
            for batch in draw_batches(part % 4, 2 * epoch + part // 4):
                assigner.update(*batch)
        assigner.step()
    return {"head": assigner.head.state_dict(), "assigner": assigner.state_dict()}


@pytest.mark.parametrize("world_sizes", [(2, 1), (2, 3), (1, 2, 4)], ids=str)
def test_resuming_on_another_number_of_ranks(world_sizes):
    alone = state = None
    for turn, world_size in enumerate(world_sizes):
        epochs = range(3 * turn, 3 * turn + 3)
        [alone] = run_on_ranks(train_and_save, 1, 1, epochs, alone, None)
        states = run_on_ranks(train_and_save, world_size, world_size, epochs, state, None)
        state = states[0]
        for other in states[1:]:
            for part in ("head", "assigner"):
                assert all_equal(other[part], state[part])
    assert torch.equal(state["head"]["assignment"], alone["head"]["assignment"])
    assert not torch.equal(state["head"]["assignment"], torch.arange(NUM_CLASSES))
    assert torch.equal(state["assigner"]["class_counts"], alone["assigner"]["class_counts"])
    torch.testing.assert_close(state["assigner"]["class_means"], alone["assigner"]["class_means"], atol=1e-6, rtol=0)


def test_with_momentum_another_number_of_ranks_keeps_means_and_counts():
    saved = run_on_ranks(train_and_save, 2, 2, range(3), None, 0.9)[0]
    for world_size in (1, 3):
        resumed = run_on_ranks(train_and_save, world_size, world_size, range(0), saved, 0.9)[0]
        assert all_equal(resumed["assigner"], saved["assigner"])
        more = run_on_ranks(train_and_save, world_size, world_size, range(3, 4), saved, 0.9)[0]
        seen = sum(len(labels) for part in range(8) for _, labels in draw_batches(part % 4, 6 + part // 4))
        gained = more["assigner"]["class_counts"] - saved["assigner"]["class_counts"]
        assert float(gained.sum()) == seen > 0
