"""transformers: its image classifiers found by themselves, counted right, and trained by its Trainer."""

import pytest
import torch
from inside import NUM_CLASSES, block

from hyperproto import convert_model, get_heads, restore_model

transformers = pytest.importorskip("transformers", reason='transformers is one of the extra "frameworks"')

ATTENTION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SMALL = {**ATTENTION, "image_size": 8, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}

#: Class, configuration, and where the heads are to be.
CLASSIFIERS = [
    ("ViT", SMALL, ["classifier"]),
    ("DeiT", SMALL, ["classifier"]),
    ("Dinov2", SMALL, ["classifier"]),
    ("ResNet", {**STAGES, "embedding_size": 8}, ["classifier.1"]),
    ("ConvNextV2", {**STAGES, "num_stages": 2}, ["classifier"]),
    (
        "Swin",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2},
        ["classifier"],
    ),
    ("CLIP", {"vision_config": SMALL, "text_config": ATTENTION}, ["classifier"]),
]


def build(kind: str, options: dict, suffix: str = "", num_labels: int = 10) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**options)
    config.num_labels = num_labels
    return getattr(transformers, f"{kind}ForImageClassification{suffix}")(config)


@pytest.mark.parametrize(("kind", "options", "names"), CLASSIFIERS, ids=[kind for kind, *_ in CLASSIFIERS])
def test_image_classifiers_are_found_and_count_their_labels(kind, options, names):
    model = build(kind, options)
    config = model.config
    convert_model(model, dim=4, num_classes=NUM_CLASSES)
    assert list(get_heads(model)) == names
    output = model(pixel_values=torch.randn(NUM_CLASSES, 3, 8, 8), labels=torch.arange(NUM_CLASSES))
    assert output.logits.shape == (NUM_CLASSES, NUM_CLASSES)
    assert output.loss.isfinite()
    assert (model.config.num_labels, len(model.config.id2label), config.num_labels) == (NUM_CLASSES, NUM_CLASSES, 10)
    assert restore_model(model).config is config
    assert model.num_labels == 10


def test_both_classifiers_of_a_model_with_a_teacher_are_converted():
    model = convert_model(build("DeiT", SMALL, "WithTeacher"), dim=4).eval()
    assert list(get_heads(model)) == ["cls_classifier", "distillation_classifier"]
    assert len({head.bank for head in get_heads(model).values()}) == 1
    embeddings = next(iter(get_heads(model).values())).recover_embeddings(
        model(pixel_values=torch.randn(5, 3, 8, 8)).logits
    )
    assert embeddings.norm(dim=1).max() <= 1.0 + 1e-4  # a mean of two embeddings, not of one and something linear


def test_timm_models_in_its_wrapper_are_found():
    config = {"architecture": "test_resnet", "num_classes": 10, "label_names": [str(label) for label in range(10)]}
    model = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig.from_dict(config))
    convert_model(model, dim=4, num_classes=NUM_CLASSES)
    assert list(get_heads(model)) == ["timm_model.fc"]
    assert model.config.num_labels == NUM_CLASSES


def test_other_models_of_transformers_are_named_by_the_caller():
    config = transformers.BertConfig(**ATTENTION, vocab_size=10, num_labels=3)
    with pytest.raises(ValueError, match=r"dotted\.name"):
        convert_model(transformers.BertForSequenceClassification(config), dim=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Trainer says of its own surroundings
def test_the_page(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    space = {
        "model": build("ViT", SMALL, num_labels=NUM_CLASSES),
        "folder": str(tmp_path),
        "dataset": [{"pixel_values": torch.randn(3, 8, 8), "labels": label % NUM_CLASSES} for label in range(24)],
        "options": {
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "remove_unused_columns": False,
        },
    }
    exec(block("transformers"), space)
    assert len(space["assigner"].history) == 2
    assert space["assigner"].class_counts.tolist() == [8.0] * NUM_CLASSES
