"""Engines that build a model without values and fill it without `load_state_dict`, or move its buffers away."""

from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hyperproto import (
    AssignmentError,
    BankError,
    HypersphericalHead,
    PrototypeBank,
    convert_model,
    get_heads,
    load_model,
)

ORDER = torch.arange(5, -1, -1)

# What these packages say of each other, and of weights that are made anew.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def check_head(head: HypersphericalHead) -> None:
    """All that is in no checkpoint follows from what is."""
    features = torch.randn(5, head.in_features)
    head.eval()
    torch.testing.assert_close(head.recover_embeddings(head(features)), head.embed(features), atol=1e-4, rtol=0.0)


# transformers


def config(**options: object) -> object:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}
    return transformers.ViTConfig(hidden_size=16, patch_size=4, num_labels=6, **sizes, **options)


def classes(kind: str) -> type[nn.Module]:
    transformers = pytest.importorskip("transformers")

    class Converting(transformers.ViTForImageClassification):
        """Converts itself, and has nothing else for it."""

        def __init__(self, config: object) -> None:
            super().__init__(config)
            convert_model(self, dim=4, classifier="classifier", seed=3)

    class WithLine(Converting):
        """As docs/whole_models.md has it."""

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, HypersphericalHead):
                module.reset_()

    class Given(transformers.ViTForImageClassification):
        """With prototypes that no construction makes."""

        def __init__(self, config: object) -> None:
            super().__init__(config)
            rows = torch.randn(8, 4, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
            convert_model(self, bank=PrototypeBank.from_tensor(rows), classifier="classifier")

    class Bare(transformers.ViTForImageClassification):
        """With a head that no conversion has put in."""

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.classifier = HypersphericalHead(16, 6, dim=4, seed=3)

    class Again(Converting):
        """Has all weights started once more when it is made."""

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.post_init()

    return {each.__name__: each for each in (Converting, WithLine, Given, Bare, Again)}[kind]


KINDS = ["Converting", "WithLine", "Given", "Bare", "Again"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_converts_itself_loads_its_own_checkpoint(kind, tmp_path):
    model = classes(kind)(config()).eval()
    model.classifier.assign_(ORDER)
    model.classifier.logit_scale.fill_(5.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = classes(kind).from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(images).logits, model(images).logits)
    check_head(loaded.classifier)
    model.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_converts_itself_starts_from_a_plain_checkpoint(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = transformers.ViTForImageClassification(config())
    plain.save_pretrained(tmp_path)
    torch.manual_seed(7)
    loaded, fresh = classes(kind).from_pretrained(tmp_path), classes(kind)(config())
    # The seeded start, whatever the global generator has been used for.
    for name, value in fresh.classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], value), name
    assert torch.equal(loaded.classifier.anchors, fresh.classifier.anchors)
    assert torch.equal(loaded.vit.embeddings.cls_token, plain.vit.embeddings.cls_token)
    check_head(loaded.classifier)


def test_half_precision_leaves_the_prototypes_alone(tmp_path):
    model = classes("Converting")(config())
    model.save_pretrained(tmp_path)
    loaded = classes("Converting").from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert loaded.vit.embeddings.cls_token.dtype == torch.bfloat16
    assert torch.equal(loaded.classifier.bank.prototypes, model.classifier.bank.prototypes)
    assert torch.equal(loaded.classifier.assignment, model.classifier.assignment)
    assert loaded(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).logits.shape == (2, 6)


class Distilled:
    """Two heads that share a bank, in a model of transformers'."""

    @staticmethod
    def make() -> type[nn.Module]:
        transformers = pytest.importorskip("transformers")

        class Two(transformers.PreTrainedModel):
            config_class = transformers.ViTConfig

            def __init__(self, config: object) -> None:
                super().__init__(config)
                self.first = HypersphericalHead(16, 6, dim=4)
                self.second = HypersphericalHead(16, 6, bank=self.first.bank, seed=1)
                self.second.bank = self.first.bank
                self.post_init()

            def forward(self, features: Tensor) -> Tensor:
                return (self.first(features) + self.second(features)) / 2

        return Two


def test_heads_that_share_a_bank_are_saved_by_transformers(tmp_path):
    kind = Distilled.make()
    model = kind(config()).eval()
    for head in get_heads(model).values():
        head.assign_(ORDER)
    model.save_pretrained(tmp_path)
    assert "second.bank.prototypes" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    loaded = kind.from_pretrained(tmp_path).eval()
    features = torch.randn(3, 16)
    assert loaded.first.bank is loaded.second.bank
    assert torch.equal(loaded(features), model(features))
    for head in get_heads(loaded).values():
        check_head(head)


def test_a_folder_of_transformers_loads_into_its_plain_class(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = convert_model(transformers.ViTForImageClassification(config()), dim=4, classifier="classifier").eval()
    model.classifier.assign_(ORDER)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    for source in (tmp_path, model.state_dict()):
        loaded = load_model(transformers.ViTForImageClassification(config()), source).eval()
        assert torch.equal(loaded(images).logits, model(images).logits)


# A start anew


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_reset_is_the_start(projection):
    head, fresh = (HypersphericalHead(8, 6, dim=4, projection=projection, seed=3) for _ in range(2))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(2.0)
    head.assign_(ORDER)
    head.logit_scale.fill_(5.0)
    head(torch.randn(9, 8))
    head.reset_()
    for name, value in fresh.state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name


@pytest.mark.parametrize("reset", ["reset_", "reset_parameters"])
def test_heads_without_values_start_anew_on_a_device(reset):
    model, fresh = (convert_model(nn.Sequential(nn.Linear(8, 6)), dim=4, classifier="0", seed=3) for _ in range(2))
    model.to("meta").to_empty(device="cpu")
    if reset == "reset_":
        model[0].reset_()
    else:  # as engines do that shard a model before it has values
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    fresh[0].assign_(ORDER)
    model[0].assign_(ORDER)
    for name, value in fresh.state_dict().items():
        # How often the assignment was set is in the last entry of its record, and the same in the stamp of the format.
        own = model.state_dict()[name]
        assert torch.equal(own[:-1], value[:-1]) if value.dim() else name == "0.format_version" or own == value, name
    check_head(model[0])


def test_what_cannot_start_anew_says_so():
    head = HypersphericalHead(8, 6, bank=PrototypeBank.from_tensor(torch.randn(6, 4)))
    with pytest.raises(AssignmentError, match="to_empty"):
        head.to("meta").reset_()
    with pytest.raises(BankError, match=r"\(given\) were lost"):
        head.to_empty(device="cpu").reset_()


# accelerate


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(hidden=nn.Linear(12, 16), act=nn.ReLU(), fc=nn.Linear(16, 6))
    return convert_model(nn.Sequential(layers), dim=4, classifier="fc")


MAPS = [
    {"": "cpu"},
    {"hidden": "disk", "act": "cpu", "fc": "cpu"},
    {"hidden": "cpu", "act": "cpu", "fc": "disk"},
]


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("places", MAPS, ids=str)
def test_a_model_built_empty_is_loaded_and_dispatched(places, include_buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = small().eval()
    model.fc.assign_(ORDER)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = small()
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(path), device_map=places, offload_folder=str(tmp_path / "offload"), offload_buffers=True
    ).eval()
    rows = torch.randn(3, 12)
    torch.testing.assert_close(loaded(rows), model(rows))
    if places.get("fc") != "disk":
        check_head(loaded.fc)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_heads_compute_and_say_what_they_cannot(way, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, moved = small().eval(), small().eval()
    if way == "dispatch_model":
        places = {"hidden": "cpu", "act": "cpu", "fc": "disk"}
        moved = accelerate.dispatch_model(moved, places, "cpu", offload_dir=tmp_path, offload_buffers=True)
    else:
        folder = (tmp_path,) if way == "disk_offload" else ()
        getattr(accelerate, way)(moved, *folder, execution_device=torch.device("cpu"), offload_buffers=True)
    rows = torch.randn(3, 12)
    for _ in range(2):
        torch.testing.assert_close(moved(rows), model(rows))
    for ask in (moved.fc.recover_embeddings, moved.fc.embeddings_from_output):
        with pytest.raises(AssignmentError, match="offload"):
            ask(model(rows).detach())
    with pytest.raises(AssignmentError, match="offload"):
        moved.fc.topk(model.fc.embed(torch.randn(3, 16)).detach(), 2)
