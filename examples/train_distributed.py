"""Several processes under torchrun, with checkpoints from which any number of processes goes on.

    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint checkpoint.pt

Trains a small timm model on made-up images with DistributedDataParallel; on GPUs if there are any, else on the CPU.
Kill it at any moment and start it again, with as many processes or with others: it goes on after the last whole epoch.
Two processes end in the same weights then, bit for bit, as if nothing had happened. docs/distributed.md has the rules.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hyperproto

NUM_CLASSES, DIM, BATCH_SIZE, LEARNING_RATE = 10, 5, 32, 1e-2


def main() -> None:
    """What every process runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    arguments = parser.parse_args()

    dist.init_process_group()  # torchrun says who is who
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    hyperproto.convert_model(model, dim=DIM)  # first convert ...
    model.to(device)
    wrapped = DistributedDataParallel(model)  # ... then wrap
    assigner = hyperproto.DynamicAssigner(model)
    criterion = hyperproto.BalancedLoss(assigner)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    state = {"model": model, "assigner": assigner, "optimizer": optimizer, "schedule": schedule}

    dataset = make_dataset()
    sampler = DistributedSampler(dataset, seed=0)
    loader = DataLoader(dataset, BATCH_SIZE, sampler=sampler)
    for epoch in range(load(arguments.checkpoint, state, device), arguments.epochs):
        sampler.set_epoch(epoch)
        wrapped.train()
        for images, labels in loader:
            loss = criterion(wrapped(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        step = assigner.step()  # on every rank: the one collective of this library
        accuracy = evaluate(model, loader, device)
        if dist.get_rank() == 0:
            save(arguments.checkpoint, state, epoch + 1)  # after step(): all ranks have the same state then
            print(f"epoch {epoch + 1}: training accuracy {accuracy:.1f} %, {step}", flush=True)
    dist.destroy_process_group()


def load(path: Path, state: dict[str, Any], device: torch.device) -> int:
    """The number of epochs that a checkpoint has seen, 0 if there is none; every rank loads the same file."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["epochs"]


def save(path: Path, state: dict[str, Any], epochs: int) -> None:
    """Write a checkpoint beside the old one, then put it in its place: whoever is killed leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    torch.save({"epochs": epochs} | {name: part.state_dict() for name, part in state.items()}, draft)
    os.replace(draft, path)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Accuracy in per cent over all ranks; by the model inside, whose buffers nobody broadcasts."""
    model.eval()
    right = torch.zeros(2, device=device)
    for images, labels in loader:
        hits = model(images.to(device)).argmax(dim=1) == labels.to(device)
        right += torch.stack([hits.sum(), torch.ones_like(hits).sum()])
    dist.all_reduce(right)
    return 100 * float(right[0] / right[1])


def make_dataset(num_images: int = 640) -> TensorDataset:
    """Images (N, 3, 32, 32) of stripes under noise, and labels (N,), which are the stripes' directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) % NUM_CLASSES
    angles = labels[:, None, None, None] * math.pi / NUM_CLASSES
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    shifts = 6.3 * torch.rand(num_images, 1, 1, 1, generator=generator)
    stripes = torch.sin((rows * angles.cos() + columns * angles.sin()) / 2 + shifts)
    return TensorDataset(stripes + 0.5 * torch.randn(num_images, 3, 32, 32, generator=generator), labels)


if __name__ == "__main__":
    main()
