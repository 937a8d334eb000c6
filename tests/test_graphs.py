"""Converted models as graphs: scripted, traced, compiled, exported, and followed by a change of assignment."""

import copy
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from compatible import MODELS, NUM_CLASSES, converted, images, in_front, needs, permute_
from timm import layers
from torch import nn

from hyperproto import BalancedLoss, DynamicAssigner, HyperprotoError, to_linear

every_model = pytest.mark.parametrize("name", MODELS)
#: For compilers and exporters, which take seconds a model.
one_model_in_front = pytest.mark.parametrize("name", in_front(MODELS, "test_resnet"))

#: torch calls its own TorchScript deprecated; it is still what timm's --torchscript and many deployments use.
torchscript = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


@every_model
@torchscript
def test_scripted(name, tmp_path):
    model, batch = converted(name).eval(), images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(batch), model(batch))
    scripted.save(str(tmp_path / "model.pt"))
    permute_(model)
    scripted.load_state_dict(model.state_dict())  # the assignment is a buffer of the script as well
    torch.testing.assert_close(scripted(batch), model(batch))
    torch.jit.load(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
@torchscript
def test_scripted_in_train_mode(projection, training_output):
    model, batch = converted("test_resnet", projection=projection, training_output=training_output), images(4)
    twin = copy.deepcopy(model)
    scripted = torch.jit.script(model)
    BalancedLoss(twin)(twin(batch), torch.arange(4)).backward()
    BalancedLoss(twin)(scripted(batch), torch.arange(4)).backward()
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4, rtol=1e-3, msg=key)


@every_model
@torchscript
def test_traced(name):
    model, batch = converted(name).eval(), images()
    with warnings.catch_warnings():
        if hasattr(model, "patch_embed"):  # timm's Vision Transformers look at shapes; our head does not
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, batch)
    more = images(3)
    torch.testing.assert_close(traced(more), model(more))
    permute_(model)
    torch.testing.assert_close(traced(more), model(more))


@every_model
def test_symbolically_traced(name):
    if name == "test_vit":
        pytest.skip("timm's Vision Transformer branches on shapes, so that fx cannot trace it, converted or not")
    model, batch = converted(name).eval(), images()
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(batch), model(batch))
    permute_(model)
    torch.testing.assert_close(graph(batch), model(batch))


@one_model_in_front
def test_exported(name):
    model, batch = converted(name).eval(), images()
    batch_size = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (batch,), dynamic_shapes=({0: batch_size},))
    more = images(5)
    torch.testing.assert_close(program.module()(more), model(more))
    assert any(key.endswith("bank.prototypes") for key in program.state_dict)
    assert any(key.endswith("assignment") for key in program.state_dict)


@needs("a conversion of batch norm to ONNX that today's onnxscript takes", torch="2.11")
@one_model_in_front
def test_onnx_gives_equal_logits(name, tmp_path):
    model, batch = converted(name).eval(), images()
    permute_(model)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnxscript's own deprecations
        torch.onnx.export(model, (batch,), path, dynamo=True, verbose=False)
    torch.testing.assert_close(run_onnx(path, batch), model(batch), atol=1e-4, rtol=1e-4)


def run_onnx(path: Path, batch: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    return torch.from_numpy(logits)


@one_model_in_front
def test_compiled_as_one_graph_that_an_assignment_step_does_not_recompile(name):
    check_compiled(name, "eager")  # what is one graph and what is recompiled does not depend on the backend


@pytest.mark.slow
@every_model
def test_compiled_by_inductor(name):
    check_compiled(name, "inductor")


def check_compiled(name: str, backend: str) -> None:
    torch.compiler.reset()
    model, batch, labels = converted(name), images(4), torch.arange(4)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assigner = DynamicAssigner(compiled)  # finds the head within
    criterion = BalancedLoss(assigner)
    criterion(compiled(batch), labels).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            permute_(model)
            assert assigner.step().changed > 0
            criterion(compiled(batch), labels).backward()
    model.eval()
    expected = model(batch)
    torch.testing.assert_close(compiled(batch), expected, atol=1e-3, rtol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        permute_(model, seed=1)
        torch.testing.assert_close(compiled(batch), model(batch), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_criteria_see_through_wrappers(wrap):
    model = converted("test_resnet")
    assert DynamicAssigner(wrap(model)).head is DynamicAssigner(model).head


def test_test_time_pooling_is_refused_and_the_advice_works():
    model = converted("test_resnet").eval()
    with pytest.raises(HyperprotoError, match="to_linear"):
        layers.TestTimePoolHead(model)
    assert layers.TestTimePoolHead(to_linear(model), original_pool=1)(images()).shape == (2, NUM_CLASSES)
