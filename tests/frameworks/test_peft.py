"""PEFT's `modules_to_save`: the head that is called is the model's, and what is kept beside it stays as it was."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import DIM, NUM_CLASSES, batches, network, samples

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HeadNotFoundError,
    compress_head,
    convert_model,
    describe,
    fit_head,
    fit_logit_scale,
    get_heads,
    refit_head,
)

peft = pytest.importorskip("peft", reason='peft is one of the extra "frameworks"')

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao and other packages that it looks for


def configuration() -> object:
    return peft.LoraConfig(target_modules=["hidden"], modules_to_save=["fc"])


def converted(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return convert_model(network(), classifier="fc", dim=DIM, seed=seed)


def kept_and_used(model: torch.nn.Module, adapter: str = "default") -> tuple[torch.nn.Module, torch.nn.Module]:
    fc = model.base_model.model.fc
    return fc.original_module, fc.modules_to_save[adapter]


def accuracy(model: torch.nn.Module) -> float:
    images, labels = samples()
    return float((model.eval()(images).argmax(dim=1) == labels).float().mean())


FITS = {
    "fit_head": fit_head,
    "refit_head": refit_head,
    "compress_head": lambda model, loader: compress_head(model, loader, dim=3),
    "class vectors": lambda model, loader: fit_head(model, loader, bank="class-vectors"),
    "fit_logit_scale": fit_logit_scale,
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_of_the_head_that_is_called(name):
    model = peft.get_peft_model(converted(), configuration())
    images, _ = samples()
    with model.disable_adapter():
        before = model.eval()(images)
    original = copy.deepcopy(kept_and_used(model)[0].state_dict())
    FITS[name](model, batches())
    if name != "fit_logit_scale":
        assert accuracy(model) > 0.9
    kept, used = kept_and_used(model)
    assert all(torch.equal(value, original[key]) for key, value in kept.state_dict().items())
    assert any(not torch.equal(value, original[key]) for key, value in used.state_dict().items() if key in original)
    with model.disable_adapter():
        assert torch.equal(model.eval()(images), before)


def test_a_fit_gives_what_it_gives_without_an_adapter():
    plain = converted()
    model = peft.get_peft_model(copy.deepcopy(plain), configuration())
    assert fit_head(model, batches()) == fit_head(plain, batches())
    images, _ = samples()
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_with_adapters_disabled_it_is_the_original_that_is_fitted():
    model = peft.get_peft_model(converted(), configuration())
    kept, used = kept_and_used(model)
    before = copy.deepcopy(used.state_dict())
    with model.disable_adapter():
        fit_head(model, batches())
        assert accuracy(model) > 0.9
    assert all(torch.equal(value, before[key]) for key, value in used.state_dict().items())
    assert not torch.equal(kept.projection[0].weight, used.projection[0].weight)


def test_a_step_moves_the_head_that_is_called_alone():
    model = peft.get_peft_model(converted(), configuration())
    assigner = DynamicAssigner(model)
    criterion, (images, labels) = BalancedLoss(assigner), samples()
    kept, used = kept_and_used(model)
    assert assigner.head is criterion.head is used
    criterion(model.train()(images), labels)
    assert assigner.step().changed
    assert not torch.equal(used.assignment, torch.arange(NUM_CLASSES))
    assert torch.equal(kept.assignment, torch.arange(NUM_CLASSES))
    assert DynamicAssigner(model).head is used  # though the other one's assignment is another


def test_an_adapter_from_a_file_trains_on(tmp_path):
    """The base has the assignment that it had, and the adapter's head the one that it was trained with."""
    model = peft.get_peft_model(converted(), configuration())
    fit_head(model, batches())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted(), tmp_path, is_trainable=True)
    images, labels = samples()
    assert torch.equal(again.eval()(images), model.eval()(images))
    criterion = BalancedLoss(DynamicAssigner(again))
    criterion(again.train()(images), labels).backward()
    criterion.assigner.step()


def test_what_was_made_of_the_original_raises_where_the_copy_is_called():
    model = converted()
    assigner = DynamicAssigner(model)
    criterion, other = BalancedLoss(assigner), BalancedLoss(model)
    wrapped = peft.get_peft_model(model, configuration())
    images, labels = samples()
    for use in (criterion, other, assigner.update):
        with pytest.raises(HeadNotFoundError, match="modules_to_save"):
            use(wrapped.train()(images), labels)
    with pytest.raises(HeadNotFoundError, match="modules_to_save"):
        assigner.step()
    with wrapped.disable_adapter():
        criterion(wrapped(images), labels)
    assert float(assigner.class_counts.sum()) == len(labels)


def test_what_was_made_of_one_adapters_head_does_not_step_anothers():
    model = peft.get_peft_model(converted(), configuration())
    assigner = DynamicAssigner(model)
    model.add_adapter("other", configuration())
    model.set_adapter("other")
    with pytest.raises(HeadNotFoundError, match="modules_to_save"):
        assigner.step()
    assert DynamicAssigner(model).head is kept_and_used(model, "other")[1]
    model.set_adapter("default")
    images, labels = samples()
    BalancedLoss(assigner)(model.train()(images), labels)
    assigner.step()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", None]), min_size=1, max_size=6))
def test_the_head_that_is_found_is_the_head_that_is_called(order):
    """Whatever adapters were chosen or disabled before."""
    model = peft.get_peft_model(converted(), configuration(), adapter_name="one")
    model.add_adapter("two", configuration())
    images, _ = samples(12)
    for adapter in order:
        (model.disable_adapter_layers if adapter is None else model.enable_adapter_layers)()
        if adapter is not None:
            model.set_adapter(adapter)
        called = []
        hooks = [
            head.register_forward_hook(lambda head, *_, called=called: called.append(head))
            for head in get_heads(model).values()
        ]
        model(images)
        for hook in hooks:
            hook.remove()
        assert [DynamicAssigner(model).head] == called


def test_describe_tells_of_the_head_that_is_called():
    model = peft.get_peft_model(converted(), configuration())
    lines = describe(model).splitlines()
    assert [line for line in lines if "projects" in line] == [
        "  base_model.model.fc.modules_to_save.default: projects 16 -> 4 (linear, batch norm)"
    ]
