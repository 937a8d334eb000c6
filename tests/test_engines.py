"""The three ways of docs/distributed.md, run as they stand there, on two ranks."""

import os
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from compatible import SYNC_BUFFERS
from ranks import run_on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hyperproto

PAGE = Path(__file__).parents[1] / "docs/distributed.md"
NUM_CLASSES, EPOCHS, NUM_IMAGES = 6, 2, 48


def snippet(heading: str) -> str:
    """The code below a heading of the page."""
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def run_snippet(rank: int, heading: str, folder: str) -> dict:
    # As torchrun sets them, and without GPUs, which two ranks cannot share.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}
    threads = {"OMP_NUM_THREADS": "1"}
    os.environ |= {name: str(value) for name, value in places.items()} | address | threads
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    os.chdir(folder)
    images, labels = torch.randn(NUM_IMAGES, 3, 32, 32), torch.arange(NUM_IMAGES) % NUM_CLASSES
    dataset = TensorDataset(images, labels)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank) if heading == "torchrun" else None
    space = {
        "hyperproto": hyperproto,
        "torch": torch,
        "model": timm.create_model("test_resnet", num_classes=NUM_CLASSES),
        "loader": DataLoader(dataset, batch_size=8, sampler=sampler, shuffle=sampler is None),
        "epochs": EPOCHS,
        "folder": folder,
    }
    # What Lightning says of its own surroundings: no TensorBoard here, few workers for so few images.
    warnings.filterwarnings("ignore", module="lightning_utilities|lightning")
    exec(snippet(heading).replace("forward_sync_buffers", SYNC_BUFFERS), space)
    if heading == "Lightning":
        module = space["trainer"].lightning_module
        space["assigner"], space["model"] = module.criterion.assigner, module.model
    assigner = space["assigner"]
    assert len(assigner.history) == EPOCHS
    if heading != "torchrun":
        check_checkpoint(heading, space, assigner)
    [head] = hyperproto.get_heads(space["model"]).values()
    assert head is assigner.head
    return {"assignment": head.assignment, "weight": head.projection[0].weight.detach(), **assigner.state_dict()}


def check_checkpoint(heading: str, space: dict, assigner: hyperproto.DynamicAssigner) -> None:
    """What the engine has saved by itself is the state after the last step."""
    expected = {name: value.clone() for name, value in assigner.state_dict().items()}
    assigner.forget(range(NUM_CLASSES))
    if heading == "Accelerate":
        space["accelerator"].wait_for_everyone()  # rank 0 writes
        space["accelerator"].load_state(space["folder"])
    else:
        module, path = space["trainer"].lightning_module, space["trainer"].checkpoint_callback.best_model_path
        module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    for name, value in assigner.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("heading", ["torchrun", "Accelerate", "Lightning"])
def test_the_documented_way_works(heading, tmp_path):
    first, second = run_on_ranks(run_snippet, 2, heading, str(tmp_path))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["class_counts"].tolist() == [EPOCHS * NUM_IMAGES / NUM_CLASSES] * NUM_CLASSES
    assert not torch.equal(first["assignment"], torch.arange(NUM_CLASSES))
