"""Long runs: thousands of operations in any order against a plain model of what they should do, and no memory kept."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from averages import NEWEST, RAISES
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from hyperproto import (
    AssignmentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HyperprotoError,
    HypersphericalHead,
    LongTailLoss,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
    convert_model,
    restore_model,
)
from hyperproto.testing import check_assignment, check_bank

NUM_CLASSES, WIDTH = 6, 7
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = [BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss]
RAISING = [
    RAISES[name]
    for name in ("over buffers, 0.9", "over buffers, mean", "ModelEmaV2, 0.9", "floats, 0.5", "all entries")
]
AVERAGES = [NEWEST["ModelEmaV3"], NEWEST["AveragedModel"], *RAISING]


@dataclass
class Expected:
    """What an assigner should hold, by the formulas of docs/method.md in float64."""

    momentum: float | None
    dim: int
    assignment: list[int] = field(default_factory=lambda: list(range(NUM_CLASSES)))
    frozen: bool = False

    def __post_init__(self) -> None:
        self.means = np.zeros((NUM_CLASSES, self.dim))
        self.sums = np.zeros((NUM_CLASSES, self.dim))
        self.counts = np.zeros(NUM_CLASSES)
        self.combined = np.zeros(NUM_CLASSES)
        self.pending = np.zeros(NUM_CLASSES)
        # What a mean was divided by when it was last normalised: rounding grows by as much.
        self.lengths = np.ones(NUM_CLASSES)

    def update(self, embeddings: np.ndarray, weights: np.ndarray) -> None:
        for label in np.flatnonzero(weights.sum(axis=0) > 0):
            total, count = weights[:, label] @ embeddings, weights[:, label].sum()
            self.counts[label] += count
            self.pending[label] += count
            if self.momentum is None:
                self.sums[label] += total
                new = self.sums[label]
                begun = self.pending[label] >= 0.5
            else:
                new = self.momentum * self.means[label] + (1 - self.momentum) * total / max(count, 1.0)
                begun = count >= 0.5 or self.means[label].any()
            if not begun:  # a sliver of a label starts no mean
                continue
            length = np.linalg.norm(new)
            self.means[label] = new / length if length > 0 else 0.0
            self.lengths[label] = length

    def step(self) -> None:
        self.combined += self.pending
        self.counts = self.combined.copy()  # less what was forgotten while pending
        self.sums[:] = 0
        self.pending[:] = 0

    def forget(self, labels: list[int]) -> None:
        for table in (self.means, self.sums, self.pending):
            table[labels] = 0


class Soak:
    """A model with everything around it, and the operations that a user may do to it in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.log: list[str] = []
        self.model: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, NUM_CLASSES))
        self.original = self.model[2]
        self.original_state = copy.deepcopy(self.original.state_dict())
        self.foreign: list[dict[str, Tensor]] = []
        self.convert()

    # Operations

    def convert(self) -> None:
        choose = self.random.choice
        num_prototypes, dim = choose([(6, 3), (6, 5), (8, 4), (9, 3)])
        self.prototypes = PrototypeBank(num_prototypes, dim).prototypes
        convert_model(
            self.model,
            bank=PrototypeBank(num_prototypes, dim),
            classifier="2",
            projection=choose(["linear", "linear+bn"]),
            training_output=choose(["logits", "embedding"]),
        )
        momentum = choose([None, 0.0, 0.9])
        self.assigner = DynamicAssigner(self.model, momentum=momentum)
        self.criterion = choose(LOSSES)(self.assigner)
        self.expected = Expected(momentum, dim)
        self.saved: tuple[bytes, Expected] | None = None
        self.averaged: nn.Module | None = None
        self.in_average: list[int] = []

    def restore_and_convert(self) -> None:
        assigner, output = self.assigner, torch.zeros(1, NUM_CLASSES)
        self.foreign = [*self.foreign[-3:], copy.deepcopy(self.model.state_dict())]
        restore_model(self.model)
        assert self.model[2] is self.original
        for name, value in self.original.state_dict().items():
            torch.testing.assert_close(value, self.original_state[name].to(value.dtype), atol=0.02, rtol=0)
        for call in (assigner.step, lambda: assigner.update(output, torch.tensor([0]))):
            with pytest.raises(HeadNotFoundError):
                call()
        self.convert()

    def batch(self) -> Tensor:
        num = self.random.choice([0, 1, 2, 5, 9])
        return torch.randn(num, WIDTH, generator=self.generator, dtype=torch.float32)

    def labels(self, num: int) -> Tensor:
        some = self.random.randint(1, NUM_CLASSES)
        return torch.randint(some, (num,), generator=self.generator)

    def feed(self, target: Tensor, batch: Tensor) -> None:
        self.model.train()
        output = self.model(batch.to(self.model[0].weight.dtype))
        self.random.choice([self.criterion, lambda out, to: self.assigner.update(out.detach(), to)])(output, target)
        embeddings = self.head.embeddings_from_output(output.detach())
        weights = nn.functional.one_hot(target, NUM_CLASSES) if target.dim() == 1 else target
        self.expected.update(embeddings.double().numpy(), weights.double().numpy())

    def update(self) -> None:
        batch = self.batch()
        self.feed(self.labels(len(batch)), batch)

    def update_with_soft_targets(self) -> None:
        batch = self.batch()
        target = torch.rand(len(batch), NUM_CLASSES, generator=self.generator).square()
        target[:, self.random.randrange(NUM_CLASSES)] = 0
        self.feed(target / target.sum(dim=1, keepdim=True), batch)

    def train(self) -> None:
        batch = self.batch()
        labels = self.labels(len(batch))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.model.train()
        criterion = self.random.choice(LOSSES)(self.head)
        criterion(self.model(batch.to(self.model[0].weight.dtype)), labels).backward()
        optimizer.step()

    def step(self) -> None:
        before = self.head.assignment.tolist()
        step = self.assigner.step()
        after = self.head.assignment.tolist()
        assert step.moved_labels == tuple(label for label in range(NUM_CLASSES) if before[label] != after[label])
        assert step.unseen == tuple(np.flatnonzero(~self.expected.means.any(axis=1)).tolist())
        if self.expected.frozen:
            assert after == before
        else:
            similarity = self.assigner.class_means.double().numpy() @ self.prototypes.double().numpy().T
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            assert similarity[range(NUM_CLASSES), after].sum() >= similarity[rows, columns].sum() - 1e-5
        self.expected.assignment = after
        self.expected.step()

    def assign(self) -> None:
        order = self.random.sample(range(len(self.prototypes)), NUM_CLASSES)
        self.head.assign_(torch.tensor(order))
        self.expected.assignment = order

    def freeze(self) -> None:
        self.assigner.freeze()
        self.expected.frozen = True

    def unfreeze(self) -> None:
        self.assigner.unfreeze()
        self.expected.frozen = False

    def forget(self) -> None:
        labels = self.random.sample(range(NUM_CLASSES), self.random.randint(0, 2))
        self.assigner.forget(labels)
        self.expected.forget(labels)

    def write_by_hand(self) -> None:
        order, valid = self.random.sample(range(len(self.prototypes)), NUM_CLASSES), self.random.random() < 0.8
        if not valid:
            order[self.random.randrange(NUM_CLASSES)] = self.random.choice([order[0], order[1], -1, 99])
            valid = sorted(set(order)) == sorted(order) and set(order) <= set(range(len(self.prototypes)))
        way, values = self.random.choice(["copy_", "data", "setattr", "state_dict"]), torch.tensor(order)
        self.log[-1] += f": {way}, {'right' if valid else 'wrong'}"
        if way == "setattr":
            self.head.assignment = values
        elif way == "copy_":
            self.head.assignment.copy_(values)
        elif way == "data":
            self.head.assignment.data.copy_(values)
        else:
            self.model.state_dict()["2.assignment"].copy_(values)
        if not valid:
            with pytest.raises(AssignmentError):
                self.model.eval()(self.batch().to(self.model[0].weight.dtype))
            self.head.assign_(torch.tensor(self.expected.assignment))
            return
        self.expected.assignment = order
        if way != "data":  # which leaves no trace before the next evaluation
            self.random.choice([self.update, self.step, self.save])()

    def average(self) -> None:
        """Over one assignment an average has that one, over several the newest, or raises until it is given it."""
        if self.averaged is None:
            self.way = self.random.choice(AVERAGES)
            self.averaged, self.in_average = self.way(self.model), self.expected.assignment
        for _ in range(self.random.choice([1, 1, 2, 5])):
            self.averaged.update_parameters(self.model)
        newest, averaged = self.expected.assignment, self.averaged.eval().module
        batch = self.batch().to(self.model[0].weight.dtype)
        self.log[-1] += f": {AVERAGES.index(self.way)}"
        if self.way in RAISING and self.in_average != newest:
            with pytest.raises(AssignmentError, match=r"average over different|no whole numbers"):
                averaged(batch)
            averaged[2].assign_(torch.tensor(newest))  # as the message says
        logits = averaged(batch)
        assert averaged[2].assignment.tolist() == newest
        limit = float(averaged[2].logit_scale)
        cosines = averaged[2].embed(averaged[:2](batch)) @ self.prototypes[newest].T
        torch.testing.assert_close(logits, limit * cosines, atol=1e-4 * limit, rtol=0)
        self.in_average = newest

    def save(self) -> None:
        buffer = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "assigner": self.assigner.state_dict()}, buffer)
        self.saved = buffer.getvalue(), copy.deepcopy(self.expected)

    def load(self) -> None:
        if self.saved is None:
            return
        state, assign = torch.load(io.BytesIO(self.saved[0]), weights_only=True), self.random.random() < 0.3
        self.model.load_state_dict(state["model"], assign=assign)
        self.assigner.load_state_dict(state["assigner"], assign=assign)
        self.expected = copy.deepcopy(self.saved[1])
        if assign:  # the dtype that was saved
            self.averaged = None
        elif self.averaged is not None:  # goes back as well, as docs/checkpoints.md says
            self.averaged.module.load_state_dict(state["model"])
            self.in_average = self.expected.assignment

    def change_dtype(self) -> None:
        self.model.to(self.random.choice(DTYPES))
        self.averaged = None  # of the dtype before

    def move(self) -> None:
        away = copy.deepcopy(self.model).to("meta")
        assert all(tensor.is_meta for tensor in [*away.parameters(), *away.buffers()])
        assert away.eval()(torch.empty(2, WIDTH, device="meta", dtype=away[0].weight.dtype)).shape == (2, NUM_CLASSES)
        away.to_empty(device="cpu").load_state_dict(self.model.state_dict())
        batch = self.batch().to(self.model[0].weight.dtype)
        assert torch.equal(away(batch), self.model.eval()(batch))

    def copy_(self) -> None:
        parts = (self.model, self.assigner, self.criterion, self.original)
        copier = self.random.choice([copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
        self.model, self.assigner, self.criterion, self.original = copier(parts)
        assert self.assigner.head is self.model[2]
        assert self.criterion.assigner is self.assigner

    def bad_input(self) -> None:
        """One of many; each must be refused by name, and leave everything as it was."""
        head, assigner, own = self.head, self.assigner, len(self.prototypes)
        output, labels = torch.zeros(2, NUM_CLASSES), torch.tensor([0, 1])
        if head.anchors is None:
            output = torch.zeros(2, head.dim)
        state, of_assigner = self.model.state_dict(), assigner.state_dict()
        twice = torch.tensor([0, 1, 2, 3, 4, 4])
        calls: dict[str, Callable[[], object]] = {
            "label too large": lambda: assigner.update(output, torch.tensor([0, NUM_CLASSES])),
            "label negative": lambda: self.criterion(output, torch.tensor([-1, 1])),
            "labels int32": lambda: assigner.update(output, labels.int()),
            "labels too few": lambda: self.criterion(output, labels[:1]),
            "soft targets int": lambda: assigner.update(output, torch.zeros(2, NUM_CLASSES, dtype=torch.int64)),
            "soft targets of other width": lambda: assigner.update(output, torch.zeros(2, NUM_CLASSES + 1)),
            "output of other width": lambda: assigner.update(torch.zeros(2, 19), labels),
            "output a list": lambda: self.criterion([output], labels),
            "features of other width": lambda: head(torch.zeros(2, WIDTH + 1)),
            "assignment twice": lambda: head.assign_(twice),
            "assignment out of range": lambda: head.assign_(torch.tensor([0, 1, 2, 3, 4, own])),
            "assignment too short": lambda: head.assign_(torch.arange(NUM_CLASSES - 1)),
            "assignment float": lambda: head.assign_(torch.arange(NUM_CLASSES).float()),
            "checkpoint with assignment twice": lambda: self.model.load_state_dict(state | {"2.assignment": twice}),
            "checkpoint of later format": lambda: self.model.load_state_dict(
                state | {"2.format_version": torch.tensor(99)}
            ),
            "checkpoint of no scale": lambda: self.model.load_state_dict(state | {"2.logit_scale": torch.tensor(0.0)}),
            "checkpoint of long prototypes": lambda: self.model.load_state_dict(
                state | {"2.bank.prototypes": 2 * self.prototypes}
            ),
            "prototypes without assignment": lambda: self.model.load_state_dict(
                {"2.bank.prototypes": self.prototypes.flip(0)}, strict=False
            ),
            "means of other shape": lambda: assigner.load_state_dict(of_assigner | {"class_means": torch.zeros(9, 9)}),
            "assigner of later format": lambda: assigner.load_state_dict(
                of_assigner | {"format_version": torch.tensor(99)}
            ),
            "converted twice": lambda: convert_model(self.model, dim=3, classifier="2"),
            "momentum of 1": lambda: DynamicAssigner(self.model, momentum=1.0),
            "weight": lambda: head.weight,
        }
        for number, foreign in enumerate(self.foreign):
            if foreign["2.bank.prototypes"].shape != self.prototypes.shape:
                calls[f"checkpoint {number} of before"] = lambda foreign=foreign: self.model.load_state_dict(foreign)
        name = self.random.choice(list(calls))
        self.log[-1] += f": {name}"
        before = copy.deepcopy((dict(state), dict(of_assigner)))
        with pytest.raises(HyperprotoError):
            calls[name]()
        for module, kept in zip((self.model, assigner), before, strict=True):
            for key, value in module.state_dict().items():
                assert torch.equal(value, kept[key]), key

    # Invariants

    @property
    def head(self) -> HypersphericalHead:
        return self.model[2]

    def check(self) -> None:
        head, assigner, expected = self.head, self.assigner, self.expected
        assert assigner.head is head
        check_assignment(head)
        assert head.assignment.tolist() == expected.assignment
        assert torch.equal(head.bank.prototypes, self.prototypes)
        assert bool(assigner.frozen) == expected.frozen
        means = assigner.class_means.double().numpy()
        assert np.isfinite(means).all()
        lengths = np.linalg.norm(means, axis=1)
        assert ((abs(lengths - 1) < 1e-5) | (lengths == 0)).all()
        tolerance = 1e-4 / np.clip(expected.lengths, 1e-4, 1)
        assert (abs(means - expected.means).max(axis=1) <= tolerance).all()
        np.testing.assert_allclose(assigner.class_counts.numpy(), expected.counts, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(assigner.pending_counts.numpy(), expected.pending, rtol=1e-4, atol=1e-3)
        self.check_logits()

    @torch.no_grad()
    def check_logits(self) -> None:
        dtype = self.model[0].weight.dtype
        features = torch.randn(3, WIDTH, generator=self.generator).to(dtype)
        training = self.head.training
        self.head.eval()
        logits, embeddings = self.head(features), self.head.embed(features)
        self.head.train(training)
        assert logits.dtype == torch.float32
        limit = float(self.head.logit_scale)
        assert math.isfinite(float(logits.sum()))
        assert float(logits.abs().max()) <= limit * (1 + 1e-5)
        cosines = embeddings @ self.prototypes[self.expected.assignment].T
        torch.testing.assert_close(logits, limit * cosines, atol=1e-5 * limit, rtol=0)


#: Operations, and how often they come beside others.
OPERATIONS = {
    Soak.update: 8,
    Soak.update_with_soft_targets: 4,
    Soak.train: 3,
    Soak.step: 4,
    Soak.assign: 1,
    Soak.freeze: 1,
    Soak.unfreeze: 2,
    Soak.forget: 1,
    Soak.write_by_hand: 1,
    Soak.average: 3,
    Soak.save: 2,
    Soak.load: 2,
    Soak.change_dtype: 2,
    Soak.move: 1,
    Soak.copy_: 1,
    Soak.restore_and_convert: 1,
    Soak.bad_input: 8,
}


# Any order of operations has steps before any batch.
@pytest.mark.filterwarnings("ignore:no batch has reached:hyperproto.HyperprotoWarning")
@pytest.mark.parametrize(
    ("seed", "num_operations"), [(0, 400), pytest.param(1, 12_000, marks=pytest.mark.slow, id="long")]
)
def test_operations_in_any_order(seed, num_operations):
    soak = Soak(seed)
    operations = soak.random.choices(list(OPERATIONS), list(OPERATIONS.values()), k=num_operations)
    assert set(operations) == set(OPERATIONS)
    for operation in operations:
        soak.log.append(operation.__name__)
        try:
            operation(soak)
            soak.check()
        except BaseException as error:
            last = ", ".join(soak.log[-15:])
            raise AssertionError(f"seed {seed}, operation {len(soak.log)}, the last ones: {last}") from error
    check_bank(soak.head.bank)


# Memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# No optimiser writes here, which a step tells.
@pytest.mark.filterwarnings("ignore:gradients of:hyperproto.HyperprotoWarning")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_is_flat_over_100_000_updates():
    head = HypersphericalHead(8, 20, dim=5, projection="linear")
    assigners = [DynamicAssigner(head, momentum=momentum) for momentum in (0.9, None)]
    criteria = [BalancedLoss(assigner) for assigner in assigners]
    features, labels = torch.randn(32, 8), torch.arange(32) % 20
    logits = head(features).detach()
    sizes = []
    for update in range(100_000):
        # Batches of all sizes, so that what is kept for one size would be seen as well.
        num = 1 + update % 32
        if update % 10:
            assigners[update % 2].update(logits[:num], labels[:num])
        else:
            criteria[update % 20 // 10](head(features[:num]), labels[:num]).backward()
            head.zero_grad()
        if update % 1000 > 997:
            assigners[update % 2].step()
        if update % 10_000 == 9999:
            sizes.append(resident_bytes())
    assert [len(assigner.history) for assigner in assigners] == [100, 100]
    growth = (sizes[-1] - sizes[0]) / 2**20
    assert growth < 2, f"{growth:.2f} MiB more after 100,000 updates than after 10,000: {sizes}"


@pytest.fixture
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_heads_assigners_and_criteria_are_freed_without_the_garbage_collector(training_output):
    head = HypersphericalHead(8, 6, dim=4, training_output=training_output)
    assigner = DynamicAssigner(head)
    criterion = BalancedLoss(assigner)
    for _ in range(3):
        criterion(head(torch.randn(12, 8)), torch.arange(12) % 6).backward()
    step = assigner.step()
    head.load_state_dict(head.state_dict())
    references = [weakref.ref(thing) for thing in (head, assigner, criterion, step, head.bank, head.projection)]
    del head, assigner, criterion, step
    assert [reference() for reference in references] == [None] * 6
