"""Averages of weights across a change of assignment: prototypes stay, the assignment is copied, never blended."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
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


class Timm(nn.Module):
    """timm's average under the names of torch's."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.ema = ModelEmaV3(model, decay=0.9, **options)

    def update_parameters(self, model: nn.Module) -> None:
        self.ema.update(model)

    @property
    def module(self) -> nn.Module:
        return self.ema.module


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


# use_buffers=True, which averages integers as well


def blended(decay: float, *, num_prototypes: int = NUM_CLASSES) -> tuple[nn.Module, AveragedModel]:
    """A model, and an average of its buffers across a change of its assignment."""
    model = small(num_prototypes)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    averaged.update_parameters(model)
    model[2].assign_(torch.arange(num_prototypes).flip(0)[:NUM_CLASSES])
    averaged.update_parameters(model)
    return model, averaged


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
def test_a_blended_assignment_is_refused_at_evaluation_and_the_advice_works(decay):
    model, averaged = blended(decay)
    batch = torch.randn(4, 5)
    for _ in range(2):
        with pytest.raises(AssignmentError, match=r"more than once.*use_buffers=True.*averaged_head\.assign_"):
            averaged.eval()(batch)
    with pytest.raises(AssignmentError, match="use_buffers=True"), torch.no_grad():  # update_bn is like this
        averaged.train()(batch)
    with pytest.raises(AssignmentError, match="more than once"):
        small().load_state_dict(averaged.module.state_dict())
    [averaged_head], [head] = get_heads(averaged).values(), get_heads(model).values()
    averaged_head.assign_(head.assignment)
    assert torch.equal(averaged.eval()(batch), averaged.module(batch))
    features = torch.randn(6, 6)
    recovered = averaged_head.recover_embeddings(averaged_head(features))
    torch.testing.assert_close(recovered, averaged_head.embed(features), atol=1e-5, rtol=1e-4)


def test_a_blended_assignment_is_refused_after_a_move_and_by_topk():
    _, averaged = blended(0.5)
    [head] = get_heads(averaged).values()
    with pytest.raises(AssignmentError, match="use_buffers=True"):
        head.topk(torch.eye(head.dim), k=1)
    averaged._apply(torch.clone)  # as a move between devices does
    for _ in range(2):
        with pytest.raises(AssignmentError, match="use_buffers=True"):
            averaged.eval()(torch.randn(4, 5))


def test_the_assignment_is_looked_at_after_each_write_and_at_no_other_time(monkeypatch):
    looked = []
    monkeypatch.setattr("hyperproto.codebook.check_assignment", lambda *args: looked.append(args))
    model, batch = small(), torch.randn(4, 5)
    model[2].assign_(torch.arange(NUM_CLASSES).flip(0))
    looked.clear()
    model(batch)  # in training nothing may wait for the device
    assert not looked
    model.eval()
    for _ in range(2):
        for _ in range(3):
            model(batch)
        assert len(looked) == 1
        model[2].assignment.copy_(torch.arange(NUM_CLASSES))
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


def test_a_blend_of_two_permutations_is_never_one():
    # By strict convexity: sum (w a + (1 - w) b)^2 < sum a^2 = sum b^2 for permutations a != b and 0 < w < 1, and
    # truncation makes it smaller still; a permutation has the sum of squares of any other.
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        num_classes = int(torch.randint(2, 200, (1,), generator=generator))
        before = torch.randperm(num_classes, generator=generator)
        pair = torch.randperm(num_classes, generator=generator)[:2]
        after = before.clone()
        after[pair] = before[pair.flip(0)]  # as little as an assignment can change
        head = HypersphericalHead(2, num_classes, bank=PrototypeBank(num_classes, 2, method="random")).eval()
        head.assignment.copy_(before)
        decay = float(torch.rand((), generator=generator)) * 0.998 + 0.001
        get_ema_multi_avg_fn(decay)([head.assignment], [after], 1)
        with pytest.raises(AssignmentError, match="written from outside"):
            head(torch.randn(1, 2))


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
