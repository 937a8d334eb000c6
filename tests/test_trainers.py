"""Trainers of other projects: stopped after an epoch and resumed, a run ends as one that nothing has disturbed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hyperproto import BalancedLoss, DynamicAssigner, HeadNotFoundError, convert_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NUM_CLASSES, EPOCHS = 6, 4


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % NUM_CLASSES
    return torch.randn(NUM_CLASSES, 12, generator=generator)[labels] + torch.randn(48, 12, generator=generator), labels


def converted() -> nn.Module:
    torch.manual_seed(0)
    return convert_model(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES)), dim=4, classifier="2")


def result(model: nn.Module, assigner: DynamicAssigner) -> dict[str, Tensor]:
    state = {**model.state_dict(), **{f"own.{name}": value for name, value in assigner.state_dict().items()}}
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Rows(Dataset):
    """What transformers' collator takes."""

    def __init__(self) -> None:
        self.inputs, self.labels = samples()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"features": self.inputs[index], "labels": int(self.labels[index])}


class Network(nn.Module):
    """A model as Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = converted()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.network(features)}


def train_with_transformers(folder: Path, epochs: int, *, resume: bool, accumulate: int = 1) -> dict[str, Tensor]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hyperproto.transformers import AssignmentCallback

    model = Network()
    assigner = DynamicAssigner(model, attach=True)
    criterion = BalancedLoss(assigner, reduction="sum")

    def loss(output: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return criterion(output["logits"], labels) / (num_items_in_batch or len(labels))

    class Stop(transformers.TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
            control.should_training_stop = round(state.epoch) >= epochs

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.1,
        save_strategy="epoch",
        logging_strategy="no",
        optim="sgd",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        compute_loss_func=loss,
        callbacks=[AssignmentCallback(assigner), Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return result(model, assigner)


def test_transformers_resumes_as_if_nothing_had_been(tmp_path):
    undisturbed = train_with_transformers(tmp_path / "undisturbed", EPOCHS, resume=False)
    train_with_transformers(tmp_path / "stopped", 2, resume=False)
    assert_equal(undisturbed, train_with_transformers(tmp_path / "stopped", EPOCHS, resume=True))
    assert float(undisturbed["own.class_counts"].sum()) == EPOCHS * 48


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = train_with_transformers(tmp_path / "whole", 1, resume=False)
    parts = train_with_transformers(tmp_path / "parts", 1, resume=False, accumulate=2)
    assert torch.equal(whole["own.class_counts"], parts["own.class_counts"])
    weights = [name for name in whole if name == "network.0.weight"]
    for name in weights:  # the projection's batch norm sees other batches
        torch.testing.assert_close(parts[name], whole[name], atol=0.05, rtol=0.0)


def train_with_lightning(folder: Path, epochs: int, *, resume: bool) -> dict[str, Tensor]:
    lightning = pytest.importorskip("lightning")
    from hyperproto.lightning import AssignmentCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = converted()
            self.criterion = BalancedLoss(DynamicAssigner(self.model))

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[AssignmentCallback(), lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(TensorDataset(*samples()), batch_size=8)
    trainer.fit(module, loader, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return result(module.model, module.criterion.assigner)


def test_lightning_resumes_as_if_nothing_had_been(tmp_path):
    undisturbed = train_with_lightning(tmp_path / "undisturbed", EPOCHS, resume=False)
    train_with_lightning(tmp_path / "stopped", 2, resume=False)
    assert_equal(undisturbed, train_with_lightning(tmp_path / "stopped", EPOCHS, resume=True))


def test_a_module_without_an_assigner_says_so():
    lightning = pytest.importorskip("lightning")
    from hyperproto.lightning import AssignmentCallback

    with pytest.raises(HeadNotFoundError, match="expected an assigner in LightningModule"):
        AssignmentCallback().on_train_epoch_end(None, lightning.LightningModule())
