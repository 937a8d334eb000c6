"""Ranks that differ, of which one fails, or that compute on unequal machines: they agree, or all raise."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from compatible import needs
from ranks import run_on_ranks, run_on_unequal_machines
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.functional import normalize

from hyperproto import (
    ArgumentError,
    AssignmentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HyperprotoError,
    HypersphericalHead,
    PrototypeBank,
    RankError,
    ShapeError,
    compress_head,
    convert_model,
    fit_head,
    fit_logit_scale,
    refit_head,
    restore_model,
)
from hyperproto.ranks import add_up_ranks, agreement, decided_by_first, fingerprint, steered_by_first

NUM_CLASSES, DIM = 7, 3
CPU = torch.device("cpu")
MOMENTA = pytest.mark.parametrize("momentum", [None, 0.9])


def make_assigner(*, num_classes: int = NUM_CLASSES, bank_seed: int = 0, **options: object) -> DynamicAssigner:
    bank = PrototypeBank(NUM_CLASSES + 2, DIM, method="random", seed=bank_seed)
    head = HypersphericalHead(DIM, num_classes, bank=bank, projection="none", training_output="embedding")
    return DynamicAssigner(head, **options)


def batch(seed: int, num_labels: int = NUM_CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(num_labels, DIM, generator=generator)), torch.arange(num_labels)


def state_of(assigner: DynamicAssigner) -> dict[str, list]:
    state = {name: value.tolist() for name, value in assigner.state_dict().items()}
    return state | {"assignment": assigner.head.assignment.tolist()}


def error_of(call: Callable[[], object]) -> list[str]:
    with pytest.raises(HyperprotoError) as failure:
        call()
    return [failure.type.__name__, str(failure.value)]


# The agreement


def agree_on(rank: int, facts: list[dict], fails: int | None) -> list[str]:
    def block() -> None:
        with agreement(CPU, advice="Do so.") as own:
            own.update(facts[rank])
            if rank == fails:
                raise AssignmentError("of its own")

    if fails is None and all(each == facts[0] for each in facts):
        block()
        return []
    error = error_of(block)
    total = torch.ones(1)
    add_up_ranks([total], CPU)  # nothing is left unpaired
    return [*error, str(int(total))]


def test_ranks_with_equal_facts_go_on():
    assert run_on_ranks(agree_on, 3, [{"number": -3, "text": "a"}] * 3, None) == [[]] * 3


def test_ranks_that_differ_all_raise_what_they_differ_in():
    facts = [
        {"size": 3, "same": 1, "name": "a"},
        {"size": 3, "same": 1, "name": "b"},
        {"size": 4, "same": 1, "name": "b"},
    ]
    results = run_on_ranks(agree_on, 3, facts, None)
    assert results == [results[0]] * 3
    assert results[0][0] == "RankError"
    assert "size ([3, 3, 4]), name (of ranks [1, 2])" in results[0][1]
    assert "same" not in results[0][1]
    assert results[0][1].endswith("Do so.")
    assert results[0][2] == "3"


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_rank_stops_all(fails):
    results = run_on_ranks(agree_on, 2, [{"size": 1}, {"size": 2}], fails)
    assert results[fails] == ["AssignmentError", "of its own", "2"]
    assert results[1 - fails][0] == "RankError"
    assert f"ranks [{fails}] of 2 have raised" in results[1 - fails][1]


def test_without_other_ranks_an_agreement_costs_no_look_at_the_facts(monkeypatch):
    monkeypatch.setattr("hyperproto.ranks.fingerprint", lambda fact: pytest.fail("looked"))
    with agreement(CPU) as facts:
        facts["tensor"] = torch.ones(3)
    with pytest.raises(KeyError), agreement(CPU) as facts:
        facts["missing"]


def test_fingerprints_are_of_bits():
    rows = torch.randn(3, 4)
    assert fingerprint(rows) == fingerprint(rows.clone()) == fingerprint(rows.T.contiguous().T)
    assert fingerprint(rows.nextafter(rows + 1)) != fingerprint(rows) != fingerprint(rows.flip(0))
    assert fingerprint(torch.tensor(0)) != fingerprint(torch.tensor(1))
    assert 0 <= fingerprint("") < 2**63


def decide_on_first(rank: int, error: str | None) -> list[str]:
    def decide() -> int:
        assert rank == 0
        if error == "ours":
            raise AssignmentError("no solution")
        if error == "another":
            raise OSError("no memory")
        return 5

    try:
        return [str(decided_by_first(decide, CPU))]
    except (HyperprotoError, OSError) as failure:
        return [type(failure).__name__, str(failure)]


def test_what_the_first_rank_decides_or_raises_is_that_of_all():
    assert run_on_ranks(decide_on_first, 2, None) == [["5"]] * 2
    assert run_on_ranks(decide_on_first, 2, "ours") == [["AssignmentError", "no solution"]] * 2
    first, second = run_on_ranks(decide_on_first, 2, "another")
    assert first == ["OSError", "no memory"]
    assert second[0] == "RankError"
    assert "rank 0 has raised" in second[1]


# Steps of ranks that differ


def frozen_on_one(rank: int) -> DynamicAssigner:
    assigner = make_assigner()
    if rank == 0:
        assigner.freeze()
    return assigner


def assigned_on_one(rank: int) -> DynamicAssigner:
    assigner = make_assigner()
    if rank == 1:
        assigner.head.assign_(torch.arange(NUM_CLASSES).flip(0) + 2)
    return assigner


def forgotten_on_one(rank: int) -> DynamicAssigner:
    assigner = make_assigner()
    assigner.update(*batch(rank))
    assigner.step()
    if rank == 0:
        assigner.forget([2, 1])
    return assigner


def loaded_on_one(rank: int) -> DynamicAssigner:
    assigner, saved = make_assigner(), make_assigner()
    saved.update(*batch(5))
    saved.step()
    if rank == 1:
        assigner.load_state_dict(saved.state_dict())
        assigner.head.load_state_dict(saved.head.state_dict())
    else:
        assigner.head.load_state_dict(saved.head.state_dict())
    return assigner


DIFFERENCES: dict[str, tuple[Callable[[int], DynamicAssigner], str]] = {
    "frozen": (frozen_on_one, r"in whether it is frozen ([1, 0])."),
    "assigned": (assigned_on_one, "in the assignment (of ranks [1])."),
    "bank": (lambda rank: make_assigner(bank_seed=rank), "in the prototypes (of ranks [1])."),
    "momentum": (lambda rank: make_assigner(momentum=[None, 0.9][rank]), "in the momentum (of ranks [1])."),
    "another momentum": (lambda rank: make_assigner(momentum=[0.8, 0.9][rank]), "in the momentum (of ranks [1])."),
    "forgotten": (forgotten_on_one, "in the class means of the last step (of ranks [1])."),
    "loaded": (loaded_on_one, "in the counts of samples up to the last step (of ranks [1])"),
    "labels": (lambda rank: make_assigner(num_classes=6 + rank), "in the number of labels ([6, 7]), the assignment"),
}


def step_of_different_ranks(rank: int, name: str) -> list:
    assigner = DIFFERENCES[name][0](rank)
    assigner.update(*batch(rank, 2))
    before = state_of(assigner)
    error = error_of(assigner.step)
    assert state_of(assigner) == before
    dist.barrier()
    return error


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_differ_all_raise_and_change_nothing(name):
    first, second = run_on_ranks(step_of_different_ranks, 2, name)
    assert first == second
    assert first[0] == "RankError"
    assert DIFFERENCES[name][1] in first[1]


def step_once_they_agree(rank: int) -> dict:
    assigner = forgotten_on_one(rank)
    error_of(assigner.step)
    assigner.forget([1, 2])  # as the message says; the order of the labels does not matter
    if rank == 0:
        assigner.load_state_dict(assigner.state_dict())
    states = [assigner.state_dict()]
    dist.broadcast_object_list(states, src=0)
    assigner.load_state_dict(states[0])
    assigner.update(*batch(rank, 1))
    assigner.step()
    return state_of(assigner)


def test_ranks_that_differed_go_on_with_one_state():
    first, second = run_on_ranks(step_once_they_agree, 2)
    assert first == second
    assert not any(first["class_means"][1])


def step_without_a_head(rank: int) -> list[str]:
    model = convert_model(nn.Sequential(nn.Identity(), nn.Linear(DIM, NUM_CLASSES)), classifier="1", dim=DIM)
    assigner = DynamicAssigner(model)
    if rank == 1:
        restore_model(model)
    return error_of(assigner.step)


def test_a_head_that_one_rank_has_taken_out_stops_all():
    first, second = run_on_ranks(step_without_a_head, 2, seconds=30)
    assert first[0] == "RankError"
    assert "ranks [1] of 2 have raised" in first[1]
    assert second[0] == HeadNotFoundError.__name__


def step_that_cannot_be_solved(rank: int) -> list:
    assigner = make_assigner()
    assigner.update(*batch(rank))
    before = state_of(assigner)

    def fail(combined: object) -> None:
        assert rank == 0
        raise AssignmentError("did not close")

    solve, assigner._solve = assigner._solve, fail
    error = error_of(assigner.step)
    assert state_of(assigner) == before
    assigner._solve = solve
    assigner.step()
    return [*error, state_of(assigner)]


def test_a_problem_that_rank_0_cannot_solve_stops_all():
    first, second = run_on_ranks(step_that_cannot_be_solved, 2)
    assert first == second
    assert first[:2] == ["AssignmentError", "did not close"]


# Unequal machines


def steps_with_shared_directions(rank: int, directions: int) -> list[dict]:
    """Embeddings with the same bits on both; where labels share a direction, rounding decides who gets what."""
    states = []
    for seed in range(6):
        bank = PrototypeBank(40, 32, method="random", seed=seed)
        dist.broadcast(bank.prototypes, src=0)
        head = HypersphericalHead(32, 40, bank=bank, projection="none", training_output="embedding")
        assigner = DynamicAssigner(head)
        generator = torch.Generator().manual_seed(100 + seed)  # not the bank's
        rows = torch.randn(directions, 32, generator=generator).repeat(40 // directions, 1)
        dist.broadcast(rows, src=0)
        assigner.update(rows / 8, torch.arange(40))
        step = assigner.step()
        assert step.changed == len(step.moved_labels) > 0
        states.append(state_of(assigner))
    return states


@pytest.mark.slow
@pytest.mark.parametrize("directions", [40, 10], ids=["own directions", "shared directions"])
def test_unequal_machines_have_the_same_means_and_assignment(directions):
    first, second = run_on_unequal_machines(steps_with_shared_directions, directions)
    assert first == second


def bank_of_its_own(rank: int) -> list[str]:
    head = HypersphericalHead(40, 100, bank="separated", projection="none", training_output="embedding")
    return error_of(DynamicAssigner(head).step)


@pytest.mark.slow
def test_banks_that_unequal_machines_build_are_noticed():
    first, second = run_on_unequal_machines(bank_of_its_own)
    assert first == second
    assert "in the prototypes (of ranks [1])" in first[1]


# What is pending, and who has fed it


def load_between_steps(rank: int, momentum: float | None, saved_by: str) -> dict:
    """Saved between two steps by rank 0 for all, by rank 1 for all, or by each rank for itself."""
    assigner, resumed = make_assigner(momentum=momentum), make_assigner(momentum=momentum)
    assigner.update(*batch(rank, 3))
    states: list = [None, None]
    dist.all_gather_object(states, assigner.state_dict())
    state = {"first": states[0], "second": states[1], "each": states[rank]}[saved_by]
    resumed.load_state_dict(state)
    for turn in range(2):
        resumed.update(*batch(10 + rank + turn, 2))  # goes on, and is saved and loaded once more
        resumed.load_state_dict(resumed.state_dict())
    resumed.step()
    assigner.step()
    return {"counts": resumed.class_counts.tolist(), "means": resumed.class_means.tolist()}


@MOMENTA
@pytest.mark.parametrize(("saved_by", "times"), [("first", 1), ("second", 1), ("each", 2)])
def test_what_is_pending_counts_once_for_each_rank_that_fed_it(momentum, saved_by, times):
    first, second = run_on_ranks(load_between_steps, 2, momentum, saved_by)
    assert first == second
    assert first["counts"] == [times + 4, times + 4, times, 0, 0, 0, 0]


def test_one_process_goes_on_with_what_any_rank_has_saved():
    states = run_on_ranks(save_between_steps, 2)
    for state in states:
        assigner = make_assigner()
        assigner.load_state_dict(state)
        assigner.step()
        assert assigner.class_counts.tolist() == [1, 1, 1, 0, 0, 0, 0]


def save_between_steps(rank: int) -> dict:
    assigner = make_assigner()
    assigner.update(*batch(rank, 3))
    return assigner.state_dict()


# Process groups in copies


def copy_with_a_group(rank: int) -> list:
    group, _ = dist.new_group([0, 1]), dist.new_group([2])
    assigner = make_assigner(process_group=group) if rank < 2 else make_assigner()
    assigner.update(*batch(0))
    copies = [copy.deepcopy(assigner), copy.deepcopy(BalancedLoss(assigner)).assigner, copy.copy(assigner)]
    if rank == 2:
        return ["trains something else"]
    same = [each.process_group is group for each in copies]
    unpickled = pickle.loads(pickle.dumps(assigner))
    message = error_of(unpickled.step)
    unpickled.process_group = group
    unpickled.step()
    return [same, message, unpickled.class_counts.tolist()]


def test_a_copy_has_the_group_and_a_pickle_asks_for_it():
    first, second, _ = run_on_ranks(copy_with_a_group, 3)
    assert first == second
    assert first[0] == [True] * 3
    assert first[1][0] == ArgumentError.__name__
    assert "assigner.process_group = group" in first[1][1]
    assert first[2] == [2.0] * NUM_CLASSES


def test_without_ranks_a_pickle_of_an_assigner_goes_on():
    assigner = pickle.loads(pickle.dumps(make_assigner()))
    assigner.update(*batch(0))
    assigner.step()
    assert issubclass(RankError, RuntimeError)
    assert assigner.process_group is None


# Fits


FITS: dict[str, Callable[..., object]] = {
    "fit_head": fit_head,
    "refit_head": partial(refit_head, iterations=3),
    "compress_head": partial(compress_head, dim=3, iterations=3),
    "fit_logit_scale": fit_logit_scale,
}


def make_model(num_classes: int = 6) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, num_classes))
    return convert_model(model, classifier="2", dim=num_classes, bank="simplex")


def samples(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator, labels = torch.Generator().manual_seed(rank), torch.arange(90) % 6
    return 1.5 * torch.eye(8)[labels] + torch.randn(90, 8, generator=generator), labels


def unreadable(rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield samples(rank)
    raise OSError("no such file")


FAULTS: dict[str, Callable[[str, int], object]] = {
    "a loader that fails": lambda name, rank: FITS[name](make_model(), unreadable(rank)),
    "a label out of range": lambda name, rank: FITS[name](make_model(), [(samples(rank)[0], samples(rank)[1] + 1)]),
    "no head": lambda name, rank: FITS[name](restore_model(make_model()), [samples(rank)]),
    "more labels": lambda name, rank: FITS[name](make_model(num_classes=8), [samples(rank)]),
}


def fit_with_a_fault(rank: int, name: str, fault: str) -> list:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    try:
        if rank == 1:
            FAULTS[fault](name, rank)
        else:
            FITS[name](model, [samples(rank)])
    except (HyperprotoError, OSError) as error:
        total = torch.ones(1)
        add_up_ranks([total], CPU)  # nothing is left unpaired
        unchanged = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return [type(error).__name__, str(error), unchanged, int(total)]
    return ["nothing raised"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FITS)
def test_a_fault_of_one_rank_stops_a_fit_on_all(name, fault):
    first, second = run_on_ranks(fit_with_a_fault, 2, name, fault, seconds=120)
    expected = {"a loader that fails": "OSError", "a label out of range": "LabelError", "no head": "HeadNotFoundError"}
    assert second[0] == expected.get(fault, "RankError")
    assert first[0] == "RankError"
    assert ("the buffers of the model" if fault == "more labels" else "ranks [1] of 2 have raised") in first[1]
    assert first[2:] == [True, 2]


def fit_by_some_ranks(rank: int) -> list:
    group, _ = dist.new_group([0, 1]), dist.new_group([2])
    states = []
    for fit in FITS.values() if rank < 2 else ():
        model = make_model()
        if fit is fit_logit_scale:
            fit_head(model, [samples(rank)], process_group=group)
        fit(model, [samples(rank)], process_group=group)
        states.append(dict(model.state_dict()))
    return states


def test_some_of_the_ranks_may_fit():
    first, second, third = run_on_ranks(fit_by_some_ranks, 3)
    assert not third
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def fit_when_sharded(rank: int, name: str, wrap: str) -> list[str]:
    model, mesh = make_model(), init_device_mesh("cpu", (2,))
    if wrap == "fully_shard":
        fully_shard(model, mesh=mesh)
    elif wrap == "FullyShardedDataParallel":
        model = FullyShardedDataParallel(model, device_id=CPU)
    else:
        distribute_module(model[2].projection[0], mesh)
    return error_of(lambda: FITS[name](model, iter([])))  # before the pass over the data


@needs("fully_shard on a CPU", torch="2.11")
@pytest.mark.parametrize("wrap", ["fully_shard", "FullyShardedDataParallel", "distribute_module"])
@pytest.mark.parametrize("name", ["fit_head", "refit_head"])
def test_a_fit_of_a_sharded_head_is_refused(name, wrap):
    for error in run_on_ranks(fit_when_sharded, 2, name, wrap):
        assert error[0] == ArgumentError.__name__
        assert "Fit first" in error[1]


def steer(rank: int) -> list:
    place, seen = torch.zeros(2), []

    def evaluate() -> torch.Tensor:
        total = place.clone()
        add_up_ranks([total], CPU)
        seen.append(total.tolist())
        return total

    def walk(evaluate_on_all: Callable[[], torch.Tensor]) -> None:
        assert rank == 0
        for _ in range(3):
            place.add_(1 + evaluate_on_all())

    steered_by_first(walk, evaluate, [place])
    return [seen, place.tolist()]


def test_the_first_rank_steers_all():
    expected = [[[0.0, 0.0], [3.0, 3.0], [15.0, 15.0]], [21.0, 21.0]]
    assert run_on_ranks(steer, 3) == [expected] * 3


def fit_on_unequal_machines(rank: int) -> list[dict]:
    """The same start on all, as from a checkpoint, in numbers that no machine rounds."""
    states, generator = [], torch.Generator().manual_seed(0)
    start = make_model()
    for parameter in start.parameters():
        parameter.data = torch.randint(-50, 50, parameter.shape, generator=generator) / 256
    dist.broadcast(start[2].bank.prototypes, src=0)
    for fit in (*FITS.values(), partial(refit_head, iterations=60), partial(compress_head, dim=4, iterations=60)):
        model = copy.deepcopy(start)
        if fit is fit_logit_scale:
            fit_head(model, [samples(rank)])
        fit(model, [samples(rank)])
        states.append(dict(model.state_dict()))
    return states


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_fits_on_unequal_machines_end_in_one_head(num_ranks):
    first, *others = run_on_unequal_machines(fit_on_unequal_machines, num_ranks=num_ranks)
    for states in others:
        for one, other in zip(first, states, strict=True):
            assert {key for key, value in one.items() if not torch.equal(value, other[key])} == set()


# Models whose buffers something else has changed


def assigner_of_distributed_tensors(rank: int, distributed_first: bool) -> list[str]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    convert_model(model, classifier="2", dim=4)
    assigner = None if distributed_first else DynamicAssigner(model)
    warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)  # torch 2.6 of every mesh of CPUs
    distribute_module(model, init_device_mesh("cpu", (2,)))
    return error_of(lambda: DynamicAssigner(model) if assigner is None else assigner.step())


@pytest.mark.parametrize("distributed_first", [True, False])
def test_a_model_whose_buffers_are_of_a_mesh_is_refused(distributed_first):
    for error in run_on_ranks(assigner_of_distributed_tensors, 2, distributed_first):
        assert error[0] == ShapeError.__name__
        assert "Distribute the layers before the head" in error[1]


def forward_with_cast_buffers(rank: int, projection: str, buffer_dtype: torch.dtype | None) -> list[str]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    convert_model(model, classifier="2", dim=4, projection=projection)
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=buffer_dtype)
    wrapped = FullyShardedDataParallel(model, device_id=CPU, mixed_precision=policy, use_orig_params=True)
    inputs = torch.randn(4, 6)
    if buffer_dtype is not None:
        return error_of(lambda: wrapped(inputs))
    logits = wrapped(inputs)
    BalancedLoss(DynamicAssigner(wrapped))(logits, torch.arange(4)).backward()
    return [str(logits.dtype)]


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_buffers_that_a_wrapper_casts_are_refused_and_the_advice_works(projection):
    for error in run_on_ranks(forward_with_cast_buffers, 2, projection, torch.bfloat16):
        assert error[0] == ShapeError.__name__
        assert "torch.bfloat16" in error[1]
        assert "without buffer_dtype" in error[1]
    assert run_on_ranks(forward_with_cast_buffers, 2, projection, None) == [["torch.float32"]] * 2
