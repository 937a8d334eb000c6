"""One model of each structure that a classifier can have: in, trained, out again, folded; with numbers."""

import copy
import itertools
import logging
import pickle

import pytest
import timm
import torch
import torchvision
from compatible import in_front, needs_model
from timm.layers import TestTimePoolHead as TimePoolHead
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    HypersphericalHead,
    NotLinearError,
    compress_head,
    convert_model,
    describe,
    get_heads,
    restore_model,
    to_linear,
)

#: timm's structures: the smallest name of each, what makes it smaller, the side of an image, where the heads go.
STRUCTURES: dict[str, tuple[dict[str, object], int, tuple[str, ...]]] = {
    "test_vit": ({}, 160, ("head",)),
    # nn.Conv2d of size 1, then Flatten
    "resnetv2_18": ({"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 16}, 64, ("head.fc",)),
    "dla46x_c": ({}, 64, ("fc",)),
    "dpn48b": ({"k_sec": (1, 1, 1, 1)}, 64, ("classifier",)),
    # batch norm and linear layer in one module, which timm can merge
    "levit_256d": ({"depth": (1, 1, 1), "embed_dim": (32, 48, 64), "num_heads": (2, 2, 2)}, 224, ("head.linear",)),
    "efficientvit_m0": ({}, 224, ("head.linear",)),
    "shvit_s1": ({}, 224, ("head.l",)),
    "iformer_t": ({}, 224, ("head.head.l",)),
    "levit_128s": ({"depth": (1, 1, 1)}, 224, ("head.linear", "head_dist.linear")),
    "repvit_m0_9": ({}, 64, ("head.head.l", "head.head_dist.l")),
    "iformer_m_distilled": ({}, 224, ("head.head.l", "head.head_dist.l")),
    # the model's own configuration forgets the second
    "levit_384_s8": (
        {"depth": (1, 1, 1), "embed_dim": (32, 48, 64), "num_heads": (2, 2, 2)},
        224,
        ("head.linear", "head_dist.linear"),
    ),
    # distilled pairs
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 1}, 32, ("head", "head_dist")),
    "pit_ti_distilled_224": ({"depth": (1, 1, 1)}, 224, ("head", "head_dist")),
    "efficientformer_l1": ({"depths": (1, 1, 1, 1)}, 224, ("head", "head_dist")),
    # several heads of different widths
    "crossvit_tiny_240": ({"depth": ((1, 1, 0),)}, 240, ("head.0", "head.1")),
    "efficientvim_m1": ({}, 64, tuple(f"heads.{i}" for i in range(4))),
    "efficientvim_m1_dist": ({}, 64, tuple(f"{part}.{i}" for part in ("heads", "heads_dist") for i in range(4))),
    # wrappers and MLPs
    "cpubone_nano": ({}, 64, ("head.classifier.linear",)),
    "caformer_s18": ({}, 64, ("head.fc.fc2",)),
    "inception_next_atto": ({}, 64, ("head.fc2",)),
    "sequencer2d_s": ({"layers": (1, 1, 1, 1), "img_size": 64}, 64, ("head.fc",)),
    "samvit_base_patch16_224": (
        {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64, "global_attn_indexes": ()},
        64,
        ("head.fc",),
    ),
    # applied to every token
    "resnet50_clip": ({"img_size": 64, "width_factor": 0.25}, 64, ("head.proj",)),
    # a second classifier, whose maximum over tokens is added
    "volo_d1_224": ({"img_size": 64}, 64, ("head",)),
    "naflexvit_base_patch16_gap": ({"depth": 1, "embed_dim": 48, "num_heads": 3}, 64, ("head",)),
}
SINGLE = [name for name, (_, _, paths) in STRUCTURES.items() if len(paths) == 1]
SEVERAL = [name for name in STRUCTURES if name not in SINGLE]
MERGING = [name for name in STRUCTURES if name.startswith(("levit", "efficientvit", "shvit", "iformer", "repvit"))]
#: One of each kind; the smallest where there is a choice.
FIRST = (
    "test_vit",
    "resnetv2_18",
    "levit_256d",
    "levit_128s",
    "deit_tiny_distilled_patch16_224",
    "crossvit_tiny_240",
    "efficientvim_m1",
    "inception_next_atto",
    "samvit_base_patch16_224",
    "resnet50_clip",
    "volo_d1_224",
)
every_structure = pytest.mark.parametrize("name", in_front(STRUCTURES, *FIRST))
NUM_CLASSES = 10


def make(name: str, num_classes: int = NUM_CLASSES, **options: object) -> nn.Module:
    """A model whose batch norms have seen something, in eval mode."""
    needs_model(name)
    model = timm.create_model(name, num_classes=num_classes, **(STRUCTURES[name][0] | options)).eval()
    return scramble_(model)


def scramble_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(tensor * (0.5 + torch.rand(tensor.shape, generator=generator)))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(tensor + 0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def images(name: str, num: int = 3) -> Tensor:
    side = STRUCTURES[name][1]
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    return model.eval()(inputs)


def parts(model: nn.Module) -> dict[str, object]:
    """Every module and parameter by name, and the number of classes; compares by identity."""
    return {
        **dict(model.named_modules(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
        "num_classes": getattr(model, "num_classes", None),
    }


def same(left: Tensor, right: Tensor) -> bool:
    """Equal up to rounding."""
    return torch.allclose(left, right, atol=2e-4 * float(left.abs().max()))


@every_structure
def test_in_trained_and_out(name):
    model, inputs = make(name), images(name)
    before, state, outputs = parts(model), copy.deepcopy(model.state_dict()), predict(model, inputs)
    convert_model(model, dim=6, num_classes=9)
    heads = get_heads(model)
    assert tuple(heads) == STRUCTURES[name][2]
    assert len({head.bank for head in heads.values()}) == 1
    assert model.num_classes == 9
    for module in model.modules():
        assert getattr(module, "num_classes", 9) in (9, NUM_CLASSES)

    model.train()
    assigner = DynamicAssigner(model)
    BalancedLoss(assigner)(model(inputs), torch.tensor([0, 1, 5])).backward()
    gradients = [parameter.grad for head in heads.values() for parameter in head.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assigner.step()
    assert all(torch.equal(head.assignment, assigner.head.assignment) for head in heads.values())

    restore_model(model).eval()
    assert parts(model) == before
    model.load_state_dict(state)  # batch norm has seen a batch
    assert torch.equal(predict(model, inputs), outputs)
    with pytest.raises(HeadNotFoundError, match="no longer part"):
        assigner.step()


@every_structure
def test_the_output_is_a_convex_combination_of_cosines(name):
    """With one and the same embedding for every input of every head, the output is that embedding's logits."""
    model = convert_model(make(name), dim=6)
    [head, *others] = get_heads(model).values()
    outputs = predict(model, images(name))
    embeddings = head.recover_embeddings(outputs)
    assert same(outputs, head.logit_scale * embeddings @ head.class_prototypes.T)
    assert float(embeddings.norm(dim=1).max()) <= 1 + 1e-4
    if not others:
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-3)
    constant = torch.nn.functional.normalize(torch.arange(1.0, 7.0), dim=0)
    for each in (head, *others):
        norm = each.projection[1]
        norm.weight.data.zero_()
        norm.bias.data.copy_(constant)
    assert same(predict(model, images(name)), (head.logit_scale * head.class_prototypes @ constant).expand(3, -1))


@every_structure
def test_embeddings_as_training_output(name):
    model = convert_model(make(name), dim=6, training_output="embedding").train()
    output = model(images(name))
    assert output.shape == (3, 6)
    BalancedLoss(DynamicAssigner(model))(output, torch.tensor([0, 1, 5])).backward()
    assert predict(model, images(name)).shape == (3, NUM_CLASSES)


# timm 1.0.15 makes classifiers of no outputs, which torch says it cannot initialise.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    "name", in_front([name for name in STRUCTURES if name != "naflexvit_base_patch16_gap"], *FIRST)
)
def test_models_made_without_a_classifier(name):
    model, inputs = make(name, num_classes=0), images(name)
    before, outputs = parts(model), predict(model, inputs)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with pytest.raises(HeadNotFoundError, match="num_classes=K"):
        convert_model(model, dim=6)
    with pytest.raises(ArgumentError):  # after the classifier was made
        convert_model(model, dim=1, num_classes=9, projection="none")
    assert parts(model) == before
    random_state = torch.get_rng_state()
    convert_model(model, dim=6, num_classes=9)
    assert torch.equal(torch.get_rng_state(), random_state)
    # timm's reset_classifier makes one head of RepViT's and iFormer's two.
    number = 1 if name.startswith(("repvit", "iformer")) else None
    assert tuple(get_heads(model)) == STRUCTURES[name][2][:number]
    assert predict(model, inputs).shape == (3, 9)
    restore_model(model)
    assert parts(model) == before
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert torch.equal(predict(model, inputs), outputs)


@pytest.mark.parametrize(
    "name", ["resnetv2_18", "levit_128s", "crossvit_tiny_240", pytest.param("volo_d1_224", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_restored_on_their_own(name, copier):
    original = make(name)
    inputs = images(name)
    outputs = predict(original, inputs)
    model = convert_model(original, dim=6)
    twin = copier(model)
    assert torch.equal(predict(twin, inputs), predict(model, inputs))
    restore_model(twin)
    assert get_heads(model)
    assert not get_heads(twin)
    assert torch.equal(predict(twin, inputs), outputs)
    assert torch.equal(predict(restore_model(model), inputs), outputs)


@pytest.mark.parametrize("projection", ["linear+bn", "none"])
def test_original_layers_follow_device_and_dtype(projection):
    model = convert_model(make("test_vit"), projection=projection)
    restore_model(model.to(torch.bfloat16).train())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.head.training
    model = convert_model(make("volo_d1_224"), dim=6).to("meta")
    assert all(parameter.is_meta for parameter in restore_model(model).parameters())


def test_a_layer_without_parameters_for_a_witness_still_follows_the_device():
    model = convert_model(nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), classifier="1", projection="none")
    assert restore_model(model.to("meta"))[1].weight.is_meta


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)
        self.head = self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


@pytest.mark.parametrize("name", ["fc", "head"])
def test_a_layer_with_two_names_is_replaced_under_both(name):
    model, images = TwoNames(), torch.randn(3, 8)
    original, before = model.fc, model(images)
    convert_model(model, dim=4, classifier=name)
    assert model.fc is model.head is next(iter(get_heads(model).values()))
    compress_head(model, [(torch.randn(16, 8), torch.arange(16) % 4)], dim=2, iterations=1)
    assert model.fc is model.head
    assert model.head.dim == 2
    assert torch.equal(restore_model(model)(images), before)
    assert model.fc is model.head is original
    expected = convert_model(model, dim=3, classifier=name).eval()(images).argmax(dim=1)
    assert torch.equal(to_linear(model)(images).argmax(dim=1), expected)
    assert model.fc is model.head


# Folding


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        *itertools.product(["test_vit", "resnetv2_18", "levit_256d"], ["linear+bn", "linear", "none"]),
        *(pytest.param("volo_d1_224", each, marks=pytest.mark.slow) for each in ("linear+bn", "linear", "none")),
    ],
)
def test_the_folded_model_ranks_as_the_head_does_and_loads(name, projection):
    dim = None if projection == "none" else 6
    model = scramble_(convert_model(make(name), dim=dim, projection=projection))
    next(iter(get_heads(model).values())).assign_(torch.randperm(NUM_CLASSES))
    inputs = images(name, 16)
    cosines = predict(model, inputs)
    assert to_linear(model) is model
    logits = predict(model, inputs)
    assert torch.equal(logits.argsort(dim=1), cosines.argsort(dim=1))
    lengths = (logits * cosines).sum(dim=1, keepdim=True) / cosines.square().sum(dim=1, keepdim=True)
    assert float(lengths.min()) > 0
    assert same(logits, lengths * cosines)

    assert not any("hyperproto" in type(module).__module__ for module in model.modules())
    assert not any("hyperproto" in repr(value) for module in model.modules() for value in module.__dict__.values())
    untouched = timm.create_model(name, num_classes=NUM_CLASSES, **STRUCTURES[name][0])
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(predict(untouched, inputs), logits)
    with pytest.raises(HeadNotFoundError, match="nothing to restore"):
        restore_model(model)


def test_folding_a_torchvision_classifier_without_pooling_behind_it():
    model = scramble_(torchvision.models.squeezenet1_1(num_classes=NUM_CLASSES).eval())
    convert_model(model, dim=6)
    inputs = torch.randn(8, 3, 64, 64)
    cosines = predict(model, inputs)
    assert torch.equal(predict(to_linear(model), inputs).argsort(dim=1), cosines.argsort(dim=1))
    assert isinstance(model.classifier[2], nn.Conv2d)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_heads_cannot_be_folded(name):
    model = convert_model(make(name), dim=6)
    before = parts(model)
    with pytest.raises(ArgumentError, match="expected a model with one head"):
        to_linear(model)
    assert parts(model) == before


# What would go wrong unnoticed


@pytest.mark.parametrize("name", in_front(MERGING, "levit_256d", "levit_128s", "repvit_m0_9"))
def test_merging_batch_norm_changes_no_logit(name):
    model, inputs = convert_model(make(name), dim=6), images(name)
    outputs = predict(model, inputs)
    merged = reparameterize_model(model)
    assert same(outputs, predict(merged, inputs))
    assert len(list(merged.modules())) < len(list(model.modules()))
    if hasattr(model, "fuse"):
        fused = copy.deepcopy(model)
        fused.fuse()  # in place
        assert same(outputs, predict(fused, inputs))
    if name in SINGLE:
        assert same(predict(to_linear(model), inputs), predict(reparameterize_model(model), inputs))
        assert "fuse" not in model.head.__dict__
    else:
        restore_model(model)
        plain = predict(model, inputs)
        assert same(plain, predict(reparameterize_model(model), inputs))


@pytest.mark.parametrize("name", ["test_vit", "resnetv2_18"])
def test_a_head_has_no_weight(name):
    model = convert_model(make(name), dim=6)
    head = model.get_classifier()
    assert not hasattr(head, "weight")
    for use in (lambda: TimePoolHead(model), lambda: head.bias.zero_()):
        with pytest.raises(NotLinearError, match="to_linear"):
            use()
    assert get_heads(model)
    if name == "resnetv2_18":
        pooled = TimePoolHead(to_linear(model), original_pool=1)
        assert predict(pooled, images(name)).shape == (3, NUM_CLASSES)


RESETTABLE = ("test_vit", "levit_128s", "volo_d1_224", "efficientvim_m1")
COPIERS = {
    "itself": lambda pair: pair,
    "a copy": copy.deepcopy,
    "a pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize(
    ("name", "num_classes", "copier"),
    in_front(
        itertools.product(RESETTABLE, [0, 7], COPIERS),
        *(("test_vit", 7, copier) for copier in COPIERS),
        *((name, 0, "itself") for name in ("test_vit", "levit_128s", "efficientvim_m1")),
        ("efficientvim_m1", 7, "a pickle"),
    ),
)
def test_reset_classifier_retires_the_heads(name, num_classes, copier):
    model = convert_model(make(name), dim=6)
    model, criterion, assigner = COPIERS[copier]((model, BalancedLoss(model), DynamicAssigner(model)))
    logits = model(images(name)).detach()
    criterion(logits, torch.tensor([0, 1, 2]))
    model.reset_classifier(num_classes)
    assert not get_heads(model)
    assert model.num_classes == num_classes
    assert parts(model).keys() == parts(make(name, num_classes=num_classes)).keys()
    for call in (
        lambda: criterion(logits, torch.tensor([0, 1, 2])),
        lambda: assigner.update(logits, torch.tensor([0, 1, 2])),
        assigner.step,
    ):
        with pytest.raises(HeadNotFoundError, match="make a new assigner, criterion and optimizer"):
            call()
    convert_model(model, dim=6, num_classes=NUM_CLASSES)
    BalancedLoss(DynamicAssigner(model))(model(images(name)), torch.tensor([0, 1, 2]))


def test_wrapped_models_are_refused_with_the_name_of_the_model_inside():
    wrapped = nn.DataParallel(convert_model(make("test_vit"), dim=6))
    for verb in (restore_model, to_linear):
        with pytest.raises(HeadNotFoundError, match=rf"{verb.__name__}\(model\.module\)"):
            verb(wrapped)
    restore_model(wrapped.module)


# Layouts


def test_dense_logits_where_pooling_is_off():
    model = convert_model(make("resnetv2_18", global_pool=""), dim=6)
    inputs = images("resnetv2_18")
    outputs = predict(model, inputs)
    assert outputs.shape == (3, NUM_CLASSES, 2, 2)
    head = next(iter(get_heads(model).values()))
    rows = model.forward_features(inputs).permute(0, 2, 3, 1)
    expected = head.logit_scale * head.embed(rows) @ head.class_prototypes.T
    assert same(outputs, expected.permute(0, 3, 1, 2))
    tokens = convert_model(make("test_vit", global_pool=""), dim=6)
    assert predict(tokens, images("test_vit")).shape[::2] == (3, NUM_CLASSES)


def test_doubled_pooling():
    model = timm.create_model("resnet18", num_classes=NUM_CLASSES, global_pool="catavgmax")
    assert get_heads(convert_model(model, dim=6))["fc"].in_features == 1024


def test_by_default_the_dimension_is_the_smallest_width():
    heads = get_heads(convert_model(make("crossvit_tiny_240")))
    assert [head.in_features for head in heads.values()] == [96, 192]
    assert [head.dim for head in heads.values()] == [96, 96]


def test_heads_of_one_width_start_apart():
    first, second = get_heads(convert_model(make("deit_tiny_distilled_patch16_224"), dim=6)).values()
    assert not torch.equal(first.projection[0].weight, second.projection[0].weight)


def test_one_of_several_stands_for_all():
    model = convert_model(make("deit_tiny_distilled_patch16_224"), dim=6, classifier="head_dist")
    assert list(get_heads(model)) == ["head", "head_dist"]


def test_the_traced_conv_head_follows_the_assignment():
    model = convert_model(make("resnetv2_18"), dim=6)
    inputs = images("resnetv2_18")
    graph = torch.fx.symbolic_trace(model)
    order = torch.randperm(NUM_CLASSES)
    next(iter(get_heads(model).values())).assign_(order)
    assert torch.equal(graph(inputs), model(inputs))


# torchvision


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_stay_linear_with_as_many_classes(name):
    model = torchvision.models.get_model(name, num_classes=NUM_CLASSES, init_weights=False)
    paths = ["aux1.fc2", "aux2.fc2"] if name == "googlenet" else ["AuxLogits.fc"]
    before = parts(model)
    random_state = torch.get_rng_state()
    convert_model(model, dim=6)
    assert all(model.get_submodule(path) is before[path] for path in paths)
    restore_model(model)
    convert_model(model, dim=6, num_classes=7)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(get_heads(model)) == ["fc"]
    output = model.train()(torch.randn(2, 3, 299, 299))
    assert {tuple(each.shape) for each in output} == {(2, 7)}
    assert all(type(model.get_submodule(path)) is nn.Linear for path in paths)
    assert "stays linear" in describe(model)
    restore_model(model)
    assert parts(model) == before


def test_auxiliary_classifier_of_timms_inception():
    model = timm.create_model("inception_v3", num_classes=NUM_CLASSES, aux_logits=True)
    before = parts(model)
    convert_model(model, dim=6, num_classes=7)
    assert list(get_heads(model)) == ["fc"]
    assert {tuple(each.shape) for each in model.train()(torch.randn(2, 3, 299, 299))} == {(2, 7)}
    assert parts(restore_model(model)) == before


def test_negative_cosines_survive_in_squeezenet():
    model = torchvision.models.squeezenet1_1(num_classes=NUM_CLASSES)
    before = parts(model)
    convert_model(model, dim=6, num_classes=7)
    output = model.train()(torch.randn(4, 3, 64, 64))
    assert output.shape == (4, 7)
    assert float(output.detach().min()) < 0
    BalancedLoss(DynamicAssigner(model))(output, torch.tensor([0, 1, 2, 3])).backward()
    assert "ReLU" in describe(model)
    restore_model(model)
    assert parts(model) == before


# The report


def test_describe_and_log(caplog):
    model = make("volo_d1_224")
    with caplog.at_level(logging.INFO, logger="hyperproto"):
        convert_model(model, dim=5)
    [record] = caplog.records
    text = describe(model)
    assert record.getMessage() == text
    assert record.name == "hyperproto.conversion.convert"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for words in (
        "VOLO: 10 classes on prototypes in dimension 5",
        "head: was Linear 384 -> 10, projects 384 -> 5 (linear, batch norm)",
        "orthoplex, 10 prototypes, largest cosine 0.0000",
        f"{parameters + 2 * 3850 - 384 * 5 - 10:,} before, {parameters:,} after",
        "aux_head taken out",
    ):
        assert words in text
    assert describe(nn.DataParallel(model)).endswith(text[text.index("bank") :])
    assert "before" not in describe(HypersphericalHead(4, 3))
    with pytest.raises(HeadNotFoundError):
        describe(restore_model(model))


def test_a_warm_start_of_a_conv_head():
    model, inputs = make("resnetv2_18"), images("resnetv2_18", 32)
    labels = predict(model, inputs).argmax(dim=1)
    convert_model(model, dim=9, warm_start=True)
    assert torch.equal(predict(model, inputs).argmax(dim=1), labels)


def test_a_warm_start_of_several_heads_gives_them_one_assignment():
    model = convert_model(make("levit_128s"), dim=9, warm_start=True)
    first, second = get_heads(model).values()
    assert torch.equal(first.assignment, second.assignment)
    for name in ("head.linear", "head_dist.linear"):
        assert f"{name}: warm start: 100.0 %" in describe(model)


def test_a_warm_start_needs_a_trained_classifier():
    bare = timm.create_model("test_vit", num_classes=0)
    before = parts(bare)
    with pytest.raises(ArgumentError, match="trained classifier"):
        convert_model(bare, num_classes=9, warm_start=True)
    assert parts(bare) == before
