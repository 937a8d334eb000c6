"""Several processes: one assignment and the same means on every rank (gloo on the CPU)."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hyperproto import AssignmentError, DynamicAssigner, HypersphericalHead

WORLD_SIZE = 2
NUM_CLASSES, DIM = 10, 5


def make_assigner(momentum: float | None) -> DynamicAssigner:
    head = HypersphericalHead(DIM, NUM_CLASSES, dim=DIM, projection="none", training_output="embedding")
    return DynamicAssigner(head, momentum=momentum)


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ranks have different numbers of batches, an empty one among them, and labels of their own."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [6, 0, 9, 4] if rank == 0 else [7, 3]
    return [
        (
            torch.nn.functional.normalize(torch.randn(size, DIM, generator=generator)),
            torch.randint(NUM_CLASSES - 1 - rank, (size,), generator=generator),
        )
        for size in sizes
    ]


def run_rank(rank: int, folder: str, momentum: float | None, poison: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    assigner = make_assigner(momentum)
    for batch in batches(rank):
        assigner.update(*batch)
    error = ""
    if poison and rank == 1:
        assigner.update(torch.full((1, DIM), float("nan")), torch.tensor([3]))
    try:
        step = assigner.step()
        torch.save({"moved": step.moved_labels, "unseen": step.unseen}, f"{folder}/step{rank}.pt")
    except AssignmentError as failure:
        error = str(failure)
    state = {"assignment": assigner.head.assignment, "error": error, **assigner.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path, momentum: float | None, *, poison: bool = False) -> list[dict]:
    mp.spawn(run_rank, args=(str(folder), momentum, poison), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_ranks_agree_bit_for_bit_and_with_one_process(tmp_path, momentum):
    first, second = run(tmp_path, momentum)
    for name in ("assignment", "class_means", "class_counts", "pending_counts"):
        assert torch.equal(first[name], second[name]), name

    seen = [label for rank in range(WORLD_SIZE) for _, labels in batches(rank) for label in labels.tolist()]
    assert first["class_counts"].tolist() == [seen.count(label) for label in range(NUM_CLASSES)]
    assert torch.load(tmp_path / "step0.pt") == torch.load(tmp_path / "step1.pt")

    if momentum is None:  # one process that saw all batches
        alone = make_assigner(None)
        for rank in range(WORLD_SIZE):
            for batch in batches(rank):
                alone.update(*batch)
        expected = alone.class_means
        alone.step()
        assert torch.equal(alone.head.assignment, first["assignment"])
    else:  # the mean of the ranks' means, each weighed by its samples
        ranks = [make_assigner(momentum) for _ in range(WORLD_SIZE)]
        for rank, assigner in enumerate(ranks):
            for batch in batches(rank):
                assigner.update(*batch)
        total = sum(assigner.class_counts[:, None] * assigner.class_means for assigner in ranks)
        expected = torch.nn.functional.normalize(total)
    torch.testing.assert_close(first["class_means"], expected, atol=1e-6, rtol=0)


def test_non_finite_means_of_one_rank_stop_all(tmp_path):
    first, second = run(tmp_path, 0.9, poison=True)
    assert first["error"] == second["error"]
    assert "[3]" in first["error"]
    for state in (first, second):
        assert torch.equal(state["assignment"], torch.arange(NUM_CLASSES))
    assert torch.isfinite(first["class_means"]).all()
