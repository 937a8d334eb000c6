"""Lightning's averages over buffers go through assignment steps: evaluated, saved at any time, resumed, in the end."""

from pathlib import Path

import pytest
import torch
from inside import DIM, NUM_SAMPLES, network, samples
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from hyperproto import BalancedLoss, DynamicAssigner, convert_model

lightning = pytest.importorskip("lightning", reason='lightning is one of the extra "frameworks"')
averages = pytest.importorskip(
    "lightning.pytorch.callbacks.weight_averaging", reason="Lightning averages weights over buffers since 2.6"
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of few workers, of no validation, of the strategy's own

EPOCHS, NUM_BATCHES = 3, 4


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = convert_model(network(), classifier="fc", dim=DIM)
        self.criterion = BalancedLoss(DynamicAssigner(self.model))
        self.validated: list[float] = []

    def training_step(self, batch, _):
        return self.criterion(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.validated.append(float((self.model(batch[0]).argmax(dim=1) == batch[1]).float().mean()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Module, *, own_first: bool, validate: bool, resume: Path | None = None) -> None:
    from hyperproto.lightning import AssignmentCallback

    callbacks = [AssignmentCallback(), averages.EMAWeightAveraging(decay=0.9)]
    saved = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[*(callbacks if own_first else reversed(callbacks)), saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Batches all alike: within an epoch Lightning resumes with the first.
    loader = DataLoader(ConcatDataset([TensorDataset(*samples())] * NUM_BATCHES), batch_size=NUM_SAMPLES)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=resume)


@pytest.mark.parametrize("own_first", [True, False])
@pytest.mark.parametrize("validate", [True, False])
def test_an_average_over_buffers_goes_through_steps(tmp_path, own_first, validate):
    module = Module()
    fit(tmp_path, module, own_first=own_first, validate=validate)
    assert any(step.changed for step in module.criterion.assigner.history)
    assert len(module.validated) == (NUM_BATCHES * EPOCHS if validate else 0)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == NUM_BATCHES * EPOCHS
    for file in files:
        Module().load_state_dict(torch.load(file, weights_only=False)["state_dict"])  # refuses what is no assignment
    Module().load_state_dict(module.state_dict())
    images, labels = samples()
    assert float((module.eval().model(images).argmax(dim=1) == labels).float().mean()) > 0.5


@pytest.mark.parametrize("own_first", [True, False])
def test_a_run_goes_on_from_within_an_epoch(tmp_path, own_first):
    undisturbed, resumed = Module(), Module()
    fit(tmp_path / "first", undisturbed, own_first=own_first, validate=False)
    middle = tmp_path / "first" / "step=6.ckpt"
    fit(tmp_path / "second", resumed, own_first=own_first, validate=False, resume=middle)
    expected = undisturbed.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
