"""Averages of weights: over one assignment they have that assignment, over several the newest, or evaluation raises.

The table in docs/checkpoints.md has a row for each way that is here.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from averages import NEWEST, RAISES, Loop, Timm, lerp, over_buffers
from compatible import in_front
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from hyperproto import (
    AssignmentError,
    BalancedLoss,
    DynamicAssigner,
    HypersphericalHead,
    PrototypeBank,
    convert_model,
    get_heads,
)
from hyperproto.conversion.channels import ChannelsFirstHead

NUM_CLASSES, DIM = 8, 3


AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ModelEmaV3": Timm,
    "ModelEmaV3 one by one": lambda model: Timm(model, foreach=False),
    "ModelEmaV3 with warm-up": lambda model: Timm(model, use_warmup=True),
    "SWA": AveragedModel,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "EMA one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
}


def small(num_prototypes: int = NUM_CLASSES, **options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))
    return convert_model(model, bank=PrototypeBank(num_prototypes, DIM), classifier="2", **options)


def train(model: nn.Module, averaged: nn.Module, epochs: int = 3) -> list[Tensor]:
    """Epochs of four batches, averaged after each, with an assignment step behind; returns the assignments."""
    generator = torch.Generator().manual_seed(0)
    assigner = DynamicAssigner(model, momentum=None)
    criterion, optimizer = BalancedLoss(assigner), torch.optim.SGD(model.parameters(), lr=0.5)
    assignments = []
    for _ in range(epochs):
        for _ in range(4):
            batch = torch.randn(16, 5, generator=generator)
            labels = torch.randint(NUM_CLASSES, (16,), generator=generator)
            criterion(model(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)
            assert torch.equal(averaged.module[2].assignment, model[2].assignment)
        assert assigner.step().changed > 0
        assignments.append(model[2].assignment.clone())
    averaged.update_parameters(model)
    return assignments


@pytest.mark.parametrize("num_prototypes", [NUM_CLASSES, NUM_CLASSES + 3])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_prototypes_stay_and_the_assignment_is_the_latest(average, num_prototypes):
    model = small(num_prototypes)
    prototypes = model[2].bank.prototypes.clone()
    averaged = average(model)
    assignments = train(model, averaged)
    assert len({tuple(assignment.tolist()) for assignment in assignments}) > 1
    head, own = averaged.module[2], model[2]
    assert torch.equal(head.bank.prototypes, prototypes)
    assert torch.equal(own.bank.prototypes, prototypes)
    assert torch.equal(head.assignment, assignments[-1])
    assert torch.equal(head.logit_scale, own.logit_scale)
    assert torch.equal(head.format_version, own.format_version)
    weight, latest = head.projection[0].weight, own.projection[0].weight
    assert 0 < float((weight - latest).detach().abs().max()) < 1  # averaged, which is the point of it
    batch = torch.randn(4, 5)
    averaged.eval()
    embeddings = head.embed(averaged.module[:2](batch))
    expected = head.logit_scale * embeddings @ own.class_prototypes.T
    torch.testing.assert_close(averaged.module.eval()(batch), expected)


@pytest.mark.parametrize("num_prototypes", [NUM_CLASSES, NUM_CLASSES + 3])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_training_goes_on_from_an_average(average, num_prototypes):
    # What an assigner needs of a head is there: its embeddings are recovered from the logits, also after a step.
    averaged = average(model := small(num_prototypes))
    train(model, averaged)
    head = averaged.module[2].eval()
    features = torch.randn(6, 6)
    for order in (head.assignment.clone(), head.assignment.flip(0)):
        head.assign_(order)
        torch.testing.assert_close(head.recover_embeddings(head(features)), head.embed(features), atol=1e-5, rtol=1e-4)


# Every way, whatever it does to integers and to floats


SPARES = (0, NUM_CLASSES)
MOVES = {"all labels": torch.arange(NUM_CLASSES).flip(0), "two labels": torch.tensor([0, 1, 4, 3, 2, 5, 6, 7])}


@pytest.mark.parametrize("spare", SPARES)
@pytest.mark.parametrize("average", (NEWEST | RAISES).values(), ids=NEWEST | RAISES)
def test_an_average_over_one_assignment_has_that_assignment(average, spare):
    model = small(NUM_CLASSES + spare)
    model[2].assign_(MOVES["all labels"] + spare)
    averaged, batch = average(model), torch.randn(4, 5)
    for _ in range(3):
        averaged.update_parameters(model)
    logits = averaged.eval().module(batch)
    head = averaged.module[2]
    assert torch.equal(head.assignment, model[2].assignment)
    torch.testing.assert_close(logits, model.eval()(batch), atol=1e-4, rtol=1e-4)
    fresh = small(NUM_CLASSES + spare).eval()
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(fresh[2].assignment, model[2].assignment)
    features = torch.randn(6, 6)
    torch.testing.assert_close(head.recover_embeddings(head(features)), head.embed(features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("average", RAISES.values(), ids=RAISES)
def test_the_assignment_of_an_average_is_read_without_evaluating_it(average):
    model = small(2 * NUM_CLASSES)
    model[2].assign_(MOVES["all labels"] + 5)
    averaged = average(model)
    for _ in range(3):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[2].assignment, model[2].assignment)


def changed(average: Callable[[nn.Module], nn.Module], spare: int, move: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model, and an average across a change of its assignment."""
    model = small(NUM_CLASSES + spare)
    averaged = average(model)
    averaged.update_parameters(model)
    model[2].assign_(move + spare)
    averaged.update_parameters(model)
    return model, averaged.eval()


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("spare", SPARES)
@pytest.mark.parametrize("average", NEWEST.values(), ids=NEWEST)
def test_an_average_that_copies_buffers_has_the_newest_assignment(average, spare, move):
    model, averaged = changed(average, spare, move)
    for _ in range(2):
        averaged.module(torch.randn(4, 5))
        assert torch.equal(averaged.module[2].assignment, model[2].assignment)
        model[2].assign_(model[2].assignment.roll(1))
        averaged.update_parameters(model)
    fresh = small(NUM_CLASSES + spare)
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(fresh[2].assignment, model[2].assignment)


@pytest.mark.parametrize(
    ("name", "spare", "move"),
    in_front(
        product(RAISES, SPARES, MOVES),
        *((name, 0, "all labels") for name in RAISES),
        *((name, NUM_CLASSES, "two labels") for name in RAISES),
    ),
)
def test_any_other_average_over_two_assignments_raises_and_the_advice_works(name, spare, move):
    average, move = RAISES[name], MOVES[move]
    batch, words = torch.randn(4, 5), "average over different assignments|no whole numbers"
    if average in (RAISES["files, as float32"], RAISES["files, as they were"]):
        with pytest.raises(AssignmentError, match=words):
            changed(average, spare, move)
        return
    model, averaged = changed(average, spare, move)
    for _ in range(2):
        with pytest.raises(AssignmentError, match=rf"({words}).*averaged_head\.assign_"):
            averaged.module(batch)
    with pytest.raises(AssignmentError, match=words), torch.no_grad():  # update_bn is like this
        averaged.module.train()(batch)
    with pytest.raises(AssignmentError, match=words):
        averaged.module[2].topk(torch.eye(DIM), k=1)
    with pytest.raises(AssignmentError, match=words):
        small(NUM_CLASSES + spare).load_state_dict(averaged.module.state_dict())
    head = averaged.module[2]
    head.assign_(model[2].assignment)
    for _ in range(2):
        averaged.eval().module(batch)
        averaged.update_parameters(model)
        assert torch.equal(head.assignment, model[2].assignment) or average in over_integers()
    averaged.eval().module(batch)
    assert torch.equal(head.assignment, model[2].assignment)


def over_integers() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Ways that cut integers, until the next evaluation sets them right."""
    for name, average in RAISES.items():
        if name.startswith(("over", "torchvision", "ModelEmaV2", "all")):
            yield average


@pytest.mark.parametrize("decay", [0.9, 0.9999, 0.99998])
def test_a_thousand_labels_through_a_thousand_updates(decay):
    head = HypersphericalHead(4, 1000, bank=PrototypeBank(2000, 4, method="random"), projection="none")
    head.assign_(torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1000])
    averages = [
        AveragedModel(head, avg_fn=lambda a, b, _: lerp(a, b, decay), use_buffers=True),
        Loop(head, decay, Tensor.is_floating_point),
    ]
    for averaged in averages:
        for _ in range(1000):
            averaged.update_parameters(head)
        averaged.module.eval()(torch.randn(1, 4))
        assert torch.equal(averaged.module.assignment, head.assignment)


def test_the_cure_for_averages_of_parameters_alone():
    # No buffer can see them: docs/checkpoints.md names them.
    model = small()
    averaged = copy.deepcopy(model)
    model[2].assign_(MOVES["all labels"])
    for own, new in zip(averaged.parameters(), model.parameters(), strict=True):
        own.data.lerp_(new, 0.5)
    [averaged_head], [head] = get_heads(averaged).values(), get_heads(model).values()
    averaged_head.assign_(head.assignment)
    batch = torch.randn(4, 5)
    torch.testing.assert_close(averaged.eval()(batch), model.eval()(batch))


@given(data=st.data(), num_classes=st.integers(2, 12), spare=st.integers(0, 12), weight=st.floats(0.001, 0.999))
def test_no_average_over_two_assignments_is_an_assignment(data, num_classes, spare, weight):
    places = list(range(num_classes + spare))
    first, second = (data.draw(st.permutations(places))[:num_classes] for _ in range(2))
    states = []
    for order in (first, second):
        bank = PrototypeBank(num_classes + spare, 2, method="random")
        head = HypersphericalHead(2, num_classes, bank=bank, projection="none").eval()
        head.assign_(torch.tensor(order))
        states.append(copy.deepcopy(head.state_dict()))
    average = {key: lerp(states[0][key], states[1][key], weight).to(states[0][key].dtype) for key in states[0]}
    for key, value in head.state_dict().items():
        value.copy_(average[key])
    if first == second:
        head(torch.randn(1, 2))
        assert head.assignment.tolist() == first
    else:
        with pytest.raises(AssignmentError, match="average over different assignments"):
            head(torch.randn(1, 2))


# Averages that take the model's place for an evaluation, as Lightning's callbacks let them


def swap(model: nn.Module, averaged: AveragedModel) -> None:
    """Exchange all values through `.data`, which leaves no trace."""
    for own, other in zip(
        model.state_dict(keep_vars=True).values(), averaged.module.state_dict().values(), strict=True
    ):
        kept = own.data.clone()
        own.data.copy_(other)
        other.copy_(kept)


@given(
    moves=st.lists(st.tuples(st.permutations(range(NUM_CLASSES)), st.integers(1, 3)), max_size=5),
    decay=st.floats(0, 0.9999),
)
def test_an_average_in_the_models_place_has_the_models_newest_assignment(moves, decay):
    model, batch = small(), torch.randn(4, 5)
    averaged = over_buffers(decay)(model)
    for order, num_updates in [*moves, (None, 1)]:
        for _ in range(num_updates):
            averaged.update_parameters(model)
        newest, weight = model[2].assignment.clone(), averaged.module[2].projection[0].weight.clone()
        model.eval()  # before the swap, which nothing tells of
        swap(model, averaged)
        model(batch)
        assert torch.equal(model[2].assignment, newest)
        assert torch.equal(model[2].projection[0].weight, weight)
        swap(model, averaged)
        assert torch.equal(model.train()[2].assignment, newest)
        assert torch.equal(averaged.module[2].assignment, newest)  # the average has been put right
        if order is not None:
            model[2].assign_(torch.tensor(order))


def test_after_a_run_was_resumed_too():
    model, averaged = changed(over_buffers(0.5), 0, MOVES["all labels"])
    again = small()
    again.load_state_dict(model.state_dict())
    swap(again, averaged)
    again.eval()(torch.randn(4, 5))
    assert torch.equal(again[2].assignment, MOVES["all labels"])


@pytest.mark.parametrize("how", ["of a later assignment", "copied", "into other buffers", "in a copy", "not finite"])
def test_other_blends_in_the_models_place_are_refused(how):
    model, averaged = changed(over_buffers(0.5), 0, MOVES["all labels"])
    if how == "of a later assignment":  # the model went back, and its average did not
        model.load_state_dict(small().state_dict())
    if how == "in a copy":
        model = copy.deepcopy(model)
    if how == "into other buffers":
        model[2].assignment = model[2].assignment.clone()
    if how == "copied":
        for own, other in zip(model.state_dict().values(), averaged.module.state_dict().values(), strict=True):
            own.copy_(other)
    else:
        swap(model, averaged)
    if how == "not finite":
        model[2].assignment_record.data[0] = torch.nan
    with pytest.raises(AssignmentError, match="average over different assignments"):
        model.eval()(torch.randn(4, 5))


# Graphs, which cannot look: `eval()` does, and what it could not put right is not compiled


def graphs_of(model: nn.Module, batch: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "compiled": lambda: torch.compile(model, backend="aot_eager")(batch),
        "compiled as one graph": lambda: torch.compile(model, backend="aot_eager", fullgraph=True)(batch),
        "exported": lambda: torch.export.export(model, (batch,)).module()(batch),
        "traced": lambda: torch.jit.trace(model, (batch,), check_trace=False)(batch),
    }


deprecated = pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated")
GRAPHS = list(graphs_of(nn.Identity(), torch.zeros(1)))


@deprecated
@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_graphs_of_an_average_over_one_assignment_have_it(graph):
    model, batch = small(), torch.randn(4, 5)
    model[2].assign_(MOVES["all labels"])
    averaged = AveragedModel(model, avg_fn=lambda a, b, _: lerp(a, b, 0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
        logits = graphs_of(averaged.module.eval(), batch)[graph]()
        torch.testing.assert_close(logits, model.eval()(batch), atol=1e-4, rtol=0.0)


@deprecated
@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_no_graph_is_made_of_an_average_over_different_assignments(graph):
    model, averaged = changed(over_buffers(0.5), 0, MOVES["all labels"])
    batch = torch.randn(4, 5)
    graph_of = graphs_of(averaged.module.eval(), batch)[graph]
    with pytest.raises((AssignmentError, torch._dynamo.exc.TorchDynamoException), match="average over different"):
        graph_of()
    averaged.module[2].assign_(model[2].assignment)  # the cure, whether before eval() or behind it
    torch.testing.assert_close(graph_of(), averaged.module(batch), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_graph_that_there_is_runs_no_more_once_its_average_is_over_different_assignments():
    model, batch = small(), torch.randn(4, 5)
    averaged = over_buffers(0.5)(model)
    averaged.update_parameters(model)
    compiled = torch.compile(averaged.module, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(batch), model.eval()(batch))
    model[2].assign_(MOVES["all labels"])
    averaged.update_parameters(model)
    with pytest.raises(AssignmentError, match="average over different"):
        compiled.eval()(batch)
    averaged.module.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(batch), model.eval()(batch))


# Written by hand


@pytest.mark.parametrize("write", ["copy_", "data", "setattr", "state_dict"])
def test_a_write_to_the_assignment_is_followed_or_refused(write):
    model, batch = small(2 * NUM_CLASSES), torch.randn(4, 5)
    model[2].assign_(torch.arange(NUM_CLASSES) + NUM_CLASSES)
    model.eval()(batch)

    def written(values: Tensor) -> nn.Module:
        model.train()
        if write == "setattr":
            model[2].assignment = values
        else:
            place = {"copy_": model[2].assignment, "data": model[2].assignment.data}
            place.get(write, model.state_dict()["2.assignment"]).copy_(values)
        return model.eval()

    for order in (torch.arange(NUM_CLASSES), torch.arange(NUM_CLASSES).flip(0) + 3):
        logits = written(order)(batch)
        head = model[2]
        expected = head.embed(model[:2](batch)) @ head.bank.prototypes[order].T * head.logit_scale
        torch.testing.assert_close(logits, expected)
        recovered = head.recover_embeddings(head(torch.ones(1, 6)))
        torch.testing.assert_close(recovered, head.embed(torch.ones(1, 6)), atol=1e-5, rtol=1e-4)
        twin = small(2 * NUM_CLASSES)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin[2].assignment, order)
        averaged = Loop(model, 0.9, Tensor.is_floating_point)
        averaged.update_parameters(model)
        averaged.module.eval()(batch)
        assert torch.equal(averaged.module[2].assignment, order)
    for wrong in (torch.zeros(NUM_CLASSES), torch.arange(NUM_CLASSES) - 1, torch.arange(NUM_CLASSES) + 2 * NUM_CLASSES):
        with pytest.raises(AssignmentError, match=r"more than once|values in \[0"):
            written(wrong.long())(batch)


def test_a_write_after_a_copy_is_not_taken_for_an_old_one():
    model = small(2 * NUM_CLASSES).eval()
    averaged = Loop(model, 0.9, Tensor.is_floating_point)
    model[2].assignment.copy_(torch.arange(NUM_CLASSES) + 3)
    model(torch.randn(1, 5))
    averaged.update_parameters(model)
    with pytest.raises(AssignmentError, match="average over different assignments"):
        averaged.module.eval()(torch.randn(1, 5))


def test_a_blended_assignment_is_refused_after_a_move():
    _, averaged = changed(over_buffers(0.5), 0, MOVES["all labels"])
    averaged._apply(torch.clone)  # as a move between devices does
    for _ in range(2):
        with pytest.raises(AssignmentError, match="average over different"):
            averaged(torch.randn(4, 5))


def test_the_assignment_is_looked_at_after_each_write_or_change_of_mode_and_at_no_other_time(monkeypatch):
    from hyperproto import assigned_bank

    looked, read = [], assigned_bank.read_assignment
    model, batch = small(), torch.randn(4, 5)
    model[2].assign_(torch.arange(NUM_CLASSES).flip(0))
    monkeypatch.setattr(assigned_bank, "read_assignment", lambda *args: looked.append(args) or read(*args))
    model(batch)  # in training nothing may wait for the device
    assert not looked
    write = lambda: model[2].assignment.copy_(torch.arange(NUM_CLASSES))  # noqa: E731
    # By eval() too, for graphs.
    for change, num_looks in ((model.eval, 2), (write, 1), (lambda: model.train().eval(), 2)):
        change()
        for _ in range(3):
            model(batch)
        assert len(looked) == num_looks
        looked.clear()


def test_heads_over_feature_maps_look_too():
    head = ChannelsFirstHead(4, NUM_CLASSES, dim=DIM).eval()
    head.assignment[0] = head.assignment[1]
    with pytest.raises(AssignmentError, match=r"more than once: \[1\]"):
        head(torch.randn(1, 4, 2, 2))


def test_evaluation_in_inference_mode_and_in_ensembles_goes_on():
    models = [small(seed=seed).eval() for seed in range(3)]
    for seed, model in enumerate(models):
        model[2].assign_(torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(seed)))
    batch = torch.randn(4, 5)
    expected = torch.stack([model(batch) for model in models])
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(models[0])(batch), expected[0])
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    outputs = vmap(lambda *state: functional_call(skeleton, state, (batch,)))(parameters, buffers)
    torch.testing.assert_close(outputs, expected)


def test_averaging_moves_nothing_but_what_it_averages():
    averaged = Timm(model := small())
    averaged.update_parameters(model)
    model[2].assign_(MOVES["all labels"])
    averaged.update_parameters(model)
    before = {name: value.clone() for name, value in averaged.module.state_dict().items()}
    averaged.eval().module(torch.randn(4, 5))
    after = averaged.module.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {"2.assignment_record"}
    assert torch.equal(after["2.assignment_record"], model.state_dict()["2.assignment_record"])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_module_that_holds_its_assigner_is_averaged_with_its_buffers(momentum):
    model = small()
    assigner = DynamicAssigner(model, momentum=momentum)
    whole = nn.ModuleDict({"model": model, "criterion": BalancedLoss(assigner)})
    averaged = AveragedModel(whole, use_buffers=True)
    assigner.freeze()
    for _ in range(3):
        whole["criterion"](model(torch.randn(16, 5)), torch.arange(16) % NUM_CLASSES)
        averaged.update_parameters(whole)
    copied = averaged.module["criterion"].assigner
    assert copied.head is averaged.module["model"][2]
    assert copied.step().solver == "frozen"
    assert int(copied.format_version) == int(assigner.format_version)
