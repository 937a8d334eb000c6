"""Runs that are killed and started again end as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperproto import BalancedLoss, DynamicAssigner, HypersphericalHead, PrototypeBank

EXAMPLE = Path(__file__).parents[1] / "examples/train_distributed.py"
NUM_CLASSES, DIM, WIDTH, STEPS_PER_EPOCH, EPOCHS, SAVE_EVERY, KILLS = 12, 5, 8, 10, 40, 3, 20

RUNS = {
    "moving means, spare prototypes": {"momentum": 0.9, "num_prototypes": 15},
    "plain means, sparse matching": {"momentum": None, "num_prototypes": 12},
}


def train(folder: Path, rank: int, store: Path, num_ranks: int, momentum: float | None, num_prototypes: int) -> None:
    """Trains in the folder, from the last checkpoint there, and writes every loss and assignment down.

    Checkpoints are written between two steps of the assigner, when each rank has samples of its own: rank 0 saves for
    all, with the assigner and the generator of each.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bank = PrototypeBank(num_prototypes, DIM, method="random")
    head = HypersphericalHead(16, NUM_CLASSES, bank=bank)
    model = forward = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.2), head)
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        forward = DistributedDataParallel(model)
        torch.manual_seed(rank)
    assigner = DynamicAssigner(model, momentum=momentum, solver="sparse" if momentum is None else "auto")
    criterion = BalancedLoss(assigner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    path, draft = folder / "checkpoint.pt", folder / "draft.pt"
    first = 0
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        assigner.load_state_dict(checkpoint["assigners"][rank])
        torch.set_rng_state(checkpoint["generators"][rank])
        first = checkpoint["number"]
    centres = torch.randn(NUM_CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
    diary = os.open(folder / f"diary {rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(first, STEPS_PER_EPOCH * EPOCHS):
        generator = torch.Generator().manual_seed(number * num_ranks + rank)
        labels = torch.randint(NUM_CLASSES, (24,), generator=generator)
        loss = criterion(forward(centres[labels] + torch.randn(24, WIDTH, generator=generator)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % STEPS_PER_EPOCH == 0:
            assigner.step()
        if number + 1 == STEPS_PER_EPOCH * (EPOCHS - 3):
            assigner.freeze()
        os.write(diary, f"{number} {loss.item().hex()} {head.assignment.tolist()}\n".encode())
        if (number + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "number": number + 1}
            state["assigners"] = of_all_ranks(assigner.state_dict(), num_ranks)
            state["generators"] = of_all_ranks(torch.get_rng_state(), num_ranks)
            if rank == 0:
                torch.save(state, draft)
                os.replace(draft, path)
    torch.save({"model": model.state_dict(), "assigner": assigner.state_dict()}, folder / f"end {rank}.pt")
    if num_ranks > 1:
        dist.barrier()  # no rank leaves while another still talks to it
        os._exit(0)  # see `ranks`


def of_all_ranks(own: object, num_ranks: int) -> list:
    every = [own] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(every, own)
    return every


def run(folder: Path, num_ranks: int, options: dict, dice: random.Random | None = None, kills: int = 0) -> int:
    """Start the training again and again until it comes to its end; how often one of its ranks was killed on the way.

    The others cannot go on without it, and are ended as torchrun ends them.
    """
    folder.mkdir()
    killed = 0
    while True:
        with tempfile.TemporaryDirectory() as store:
            arguments = [(folder, rank, Path(store, "store"), num_ranks) for rank in range(num_ranks)]
            ranks = [CONTEXT.Process(target=train, args=each, kwargs=options, daemon=True) for each in arguments]
            diary = folder / "diary 0.txt"
            length = diary.stat().st_size if diary.exists() else 0
            for process in ranks:
                process.start()
            if killed < kills:
                while ranks[0].is_alive() and not (diary.exists() and diary.stat().st_size > length):
                    time.sleep(0.001)  # until it trains
                time.sleep(dice.uniform(0.0, 0.06 * num_ranks))
                victim = dice.choice(ranks)
                victim.kill()
                victim.join()
                if victim.exitcode == -signal.SIGKILL:
                    for process in ranks:
                        process.kill()
            for process in ranks:
                process.join()
        codes = [process.exitcode for process in ranks]
        if codes == [0] * num_ranks:
            return killed
        assert killed < kills, codes
        assert victim.exitcode == -signal.SIGKILL, codes
        killed += 1


def read_diaries(folder: Path) -> list[dict[int, set[str]]]:
    """What each rank has written down at each step, however often it was done."""
    diaries = []
    for path in sorted(folder.glob("diary *.txt")):
        pages = defaultdict(set)
        for line in path.read_text().splitlines():
            number, entry = line.split(" ", maxsplit=1)
            pages[int(number)].add(entry)
        diaries.append(pages)
    return diaries


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2], ids=["one process", "two processes"])
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(name, num_ranks, tmp_path):
    assert run(tmp_path / "undisturbed", num_ranks, RUNS[name]) == 0
    expected = read_diaries(tmp_path / "undisturbed")
    assert [len(pages) for pages in expected] == [STEPS_PER_EPOCH * EPOCHS] * num_ranks
    assert len({entry.split(" ", maxsplit=1)[1] for entries in expected[0].values() for entry in entries}) > 3
    killed, dice = 0, random.Random(name)
    while killed < KILLS:  # a fast machine ends a run before all kills are done
        folder = tmp_path / f"from kill {killed}"
        killed += run(folder, num_ranks, RUNS[name], dice, KILLS - killed)
        assert read_diaries(folder) == expected
        for rank in range(num_ranks):
            end = torch.load(tmp_path / f"undisturbed/end {rank}.pt")
            for part, entries in torch.load(folder / f"end {rank}.pt").items():
                for key, value in entries.items():
                    assert torch.equal(value, end[part][key]), key


def test_embeddings_recovered_from_logits_are_the_same_after_loading():
    """Bit for bit, whatever way the assignment came about; prototypes this close make any rounding visible."""
    angles = 3e-5 * torch.arange(5.0)
    heads = []
    for _ in range(2):
        bank = PrototypeBank.from_tensor(torch.stack([angles.cos(), angles.sin()], dim=1))
        heads.append(HypersphericalHead(2, 5, bank=bank, projection="none"))
    trained, resumed = heads
    for order in ([3, 1, 4, 0, 2], [2, 4, 1, 0, 3]):
        trained.assign_(torch.tensor(order))
        resumed.load_state_dict(trained.state_dict())
        logits = trained(torch.randn(8, 2))
        assert torch.equal(resumed.recover_embeddings(logits), trained.recover_embeddings(logits))


# The example, under torchrun


def launch(folder: Path, ranks: int, epochs: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = ["--epochs", str(epochs), "--checkpoint", str(folder / "checkpoint.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, str(EXAMPLE), *arguments], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_example_goes_on_after_a_rank_was_killed_and_on_another_number_of_ranks(tmp_path):
    """The other rank cannot go on alone: torchrun ends, and is started again."""
    assert launch(tmp_path / "undisturbed", 2, 3).wait(timeout=200) == 0
    folder, dice = tmp_path / "killed", random.Random(0)
    checkpoint = folder / "checkpoint.pt"
    process = launch(folder, 2, 3)
    while not checkpoint.exists():
        time.sleep(0.01)
    time.sleep(dice.uniform(0.0, 0.2))
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(dice.choice(ranks)), signal.SIGKILL)
    assert process.wait(timeout=200) != 0
    assert torch.load(checkpoint)["epochs"] < 3
    assert launch(folder, 2, 3).wait(timeout=200) == 0
    end, expected = torch.load(checkpoint), torch.load(tmp_path / "undisturbed/checkpoint.pt")
    for part in ("model", "assigner"):
        for key, value in expected[part].items():
            assert torch.equal(end[part][key], value), key
    assert end["assigner"]["class_counts"].tolist() == [3 * 64] * 10
    assert launch(folder, 1, 4).wait(timeout=200) == 0
    assert torch.load(checkpoint)["assigner"]["class_counts"].tolist() == [4 * 64] * 10
