"""Training steps on a GPU: they never wait for it, fit into CUDA graphs, and need no tensor as wide as the classes."""

import copy

import pytest
import torch
from cases import (
    BATCH,
    DIM,
    FEATURES,
    LOSSES,
    NUM_CLASSES,
    assigner_of,
    batch,
    make_head,
    no_synchronisation,
    training_step,
)
from cuda_graph import captured
from torch import nn

from hyperproto import BalancedLoss, DynamicAssigner, HypersphericalHead, PrototypeBank


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("output", ["logits", "embedding"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_waits_for_the_gpu(device, loss, output, target, momentum):
    head = make_head(output).to(device)
    assigner = DynamicAssigner(head, momentum=momentum)
    criterion = LOSSES[loss](assigner)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    features, targets = batch(device, target)
    features.requires_grad_()
    training_step(head, criterion, features, targets, optimizer)  # buffers follow the head, libraries start
    before = assigner.class_counts.sum()
    with no_synchronisation():
        training_step(head, criterion, features, targets, optimizer)
    assert float(assigner.class_counts.sum() - before) == pytest.approx(BATCH, rel=1e-5)
    assert features.grad.any()


def test_a_wait_for_the_gpu_would_be_seen(device):
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchronizing"):
        float(torch.ones((), device=device))


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("output", ["logits", "embedding"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_cuda_graph_goes_on_across_a_step(device, loss, output, target):
    features, targets = batch(device, target)
    histories = []
    for stream in (torch.cuda.Stream(), None):
        head = make_head(output).to(device)
        assigner = DynamicAssigner(head)
        criterion = LOSSES[loss](assigner)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        latest = torch.zeros((), device=device)

        def step(head=head, criterion=criterion, optimizer=optimizer, latest=latest) -> None:
            latest.copy_(training_step(head, criterion, features, targets, optimizer))

        replay = captured(step, stream)
        losses = []
        for number in range(10):
            if number == 5:
                moved = assigner.step().changed
            replay()
            torch.cuda.synchronize()
            losses.append(float(latest))
        assert moved > 0
        histories.append([*losses, *assigner.class_means.flatten().tolist()])
    # In eager mode the new assignment is what the loss sees.
    assert histories[0] == pytest.approx(histories[1], rel=1e-3, abs=1e-4)


def test_a_scaler_skips_what_overflows(device):
    head = make_head().to(device)
    criterion = BalancedLoss(DynamicAssigner(head))
    backbone = nn.Linear(FEATURES, FEATURES, device=device)  # in float16, which is what overflows
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    features, labels = batch(device)
    weight = head.projection[0].weight.clone()
    scales = []
    for number in range(40):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            output = head(backbone(features))
        scaler.scale(criterion(output, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if number == 0:
            assert torch.equal(head.projection[0].weight, weight)
    assert scales[0] == 2.0**39
    assert scales[-1] == scales[-2] < scales[0]
    assert not torch.equal(head.projection[0].weight, weight)
    for tensor in (*backbone.parameters(), *head.parameters(), criterion.assigner.class_means):
        assert torch.isfinite(tensor).all()


def test_embeddings_of_a_million_classes_take_the_memory_of_the_batch(device, record_property):
    num_classes, dim = 1_000_000, 128
    rows = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    head = HypersphericalHead(
        dim, num_classes, bank=PrototypeBank.from_tensor(rows), training_output="embedding", logit_scale=10.0
    ).to(device)
    criterion = BalancedLoss(DynamicAssigner(head))
    features = torch.randn(256, dim, device=device, requires_grad=True)
    labels = torch.randint(num_classes, (256,), device=device)
    criterion(head(features), labels).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    criterion(head(features), labels).backward()
    added = torch.cuda.max_memory_allocated() - before
    record_property("mib_beyond_bank_and_means", added / 2**20)
    # A (B, C) tensor is 977 MiB, a second bank 488.
    assert added < 32 * 2**20


def test_step_gives_the_assignment_of_the_cpu(device):
    heads = [make_head("embedding") for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    heads[1].to(device)
    cpu = torch.device("cpu")
    steps = []
    for head, place in zip(heads, (cpu, device), strict=True):
        assigner = assigner_of(head, [batch(place, seed=seed) for seed in range(4)])
        steps.append((assigner.step(), head.assignment.cpu(), assigner.class_means.cpu()))
    (first, assignment, means), (second, other_assignment, other_means) = steps
    assert first.changed > 0
    assert torch.equal(assignment, other_assignment)
    assert (first.moved_labels, first.unseen) == (second.moved_labels, second.unseen)
    torch.testing.assert_close(means, other_means, atol=1e-5, rtol=1e-5)
    assert second.similarity_after == pytest.approx(first.similarity_after, abs=1e-4)


def test_images_in_channels_last(device):
    stem = nn.Sequential(nn.Conv2d(3, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), make_head())
    images = torch.randn(BATCH, 3, 16, 16)
    labels = torch.arange(BATCH) % NUM_CLASSES
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(stem).to(device, memory_format=memory_format)
        criterion = BalancedLoss(DynamicAssigner(model))
        output = model(images.to(device, memory_format=memory_format))
        criterion(output, labels.to(device)).backward()
        results.append([output, criterion.assigner.class_means, model[0].weight.grad])
    for contiguous, last in zip(*results, strict=True):
        torch.testing.assert_close(contiguous, last, atol=1e-4, rtol=1e-3)
    assert results[0][1].shape == (NUM_CLASSES, DIM)
