"""Converted models as graphs: scripted, traced, compiled, exported, and followed by a change of assignment.

Graphs that are made once serve all batch sizes above one, and both modes where those over torch's own layers do.
"""

import copy
import io
import pickle
import warnings
from itertools import product
from pathlib import Path

import onnxruntime
import pytest
import torch
from compatible import MODELS, NUM_CLASSES, converted, images, in_front, needs, permute_
from timm import layers
from timm.utils.onnx import onnx_export
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, quantize_fx
from torch.fx.experimental.proxy_tensor import make_fx

from hyperproto import (
    BalancedLoss,
    DynamicAssigner,
    HyperprotoError,
    HypersphericalHead,
    LongTailLoss,
    PrototypeCrossEntropyLoss,
    convert_model,
    get_heads,
    restore_model,
    to_linear,
)

every_model = pytest.mark.parametrize("name", MODELS)
#: For compilers and exporters, which take seconds a model.
one_model_in_front = pytest.mark.parametrize("name", in_front(MODELS, "test_resnet"))

#: torch calls its own TorchScript deprecated; it is still what timm's --torchscript and many deployments use.
torchscript = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


@pytest.mark.parametrize("name", in_front(MODELS, "test_resnet", "deit_tiny_distilled_patch16_224"))
@torchscript
def test_scripted(name, tmp_path):
    model, batch = converted(name).eval(), images()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(batch), model(batch))
    scripted.save(str(tmp_path / "model.pt"))
    permute_(model)
    # The assignment is a buffer of the script as well. A script does not know that a bank stands for several names.
    told = scripted.load_state_dict(model.state_dict(), strict=False)
    shared = ["head_dist.bank.prototypes"] if "distilled" in name else []
    assert (told.missing_keys, told.unexpected_keys) == (shared, [])
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


@pytest.mark.parametrize("name", in_front(MODELS, "test_resnet", "deit_tiny_distilled_patch16_224"))
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


@pytest.mark.slow
@needs("a conversion of batch norm to ONNX that today's onnxscript takes", torch="2.11")
@every_model
def test_onnx_gives_equal_logits(name, tmp_path):
    model, batch = converted(name).eval(), images()
    permute_(model)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and onnxscript's own deprecations
        torch.onnx.export(model, (batch,), path, dynamo=True, verbose=False)
    torch.testing.assert_close(run_onnx(path, batch), model(batch), atol=1e-4, rtol=1e-4)


def run_onnx(model: Path | bytes, batch: torch.Tensor) -> torch.Tensor:
    model = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
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


# Every batch size above one, in either mode


#: Rows and feature maps; in train mode with either output, and in eval mode.
KINDS, MODES = ("rows", "maps"), ("logits", "embedding", "eval")
kinds = pytest.mark.parametrize("kind", KINDS)
modes = pytest.mark.parametrize("mode", MODES)


def small(kind: str, mode: str) -> nn.Module:
    """A converted model that has seen a few batches, in the mode, with the default projection."""
    torch.manual_seed(0)
    body = nn.Linear(6, 16) if kind == "rows" else nn.Conv2d(6, 16, 3, padding=1)
    classifier = nn.Linear(16, NUM_CLASSES) if kind == "rows" else nn.Conv2d(16, NUM_CLASSES, 1)
    pooling = nn.Identity() if kind == "rows" else nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(body, pooling, nn.Tanh(), classifier, nn.Flatten())
    output = "embedding" if mode == "embedding" else "logits"
    convert_model(model, dim=4, classifier="3", training_output=output)
    for size in (9, 12):
        model(batch_of(kind, size))
    return model.train(mode != "eval")


def batch_of(kind: str, size: int) -> Tensor:
    return torch.randn(size, 6) if kind == "rows" else torch.randn(size, 6, 5, 5)


@pytest.mark.parametrize(("kind", "mode"), in_front(product(KINDS, MODES), ("rows", "logits")))
def test_as_many_compiled_graphs_for_all_batch_sizes_as_of_the_unconverted_model(kind, mode):
    model = small(kind, mode)
    num_graphs = check_sizes_compiled(model, copy.deepcopy(model), kind)
    plain = restore_model(small(kind, mode))
    assert num_graphs == check_sizes_compiled(plain, plain, kind)
    assert num_graphs == 2 or kind == "maps"  # size 1 has its own


def check_sizes_compiled(model: nn.Module, twin: nn.Module, kind: str) -> int:
    """Compile a model, which computes for batches of several sizes what a twin computes; how many graphs that takes."""
    torch.compiler.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for size in (16, 7, 3, 2, 1):
        batch = batch_of(kind, size)
        torch.testing.assert_close(compiled(batch), twin(batch))
    return len(graphs)


@pytest.mark.parametrize(
    ("loss", "training_output", "target"),
    in_front(
        product([BalancedLoss, LongTailLoss, PrototypeCrossEntropyLoss], ["logits", "embedding"], ["labels", "soft"]),
        (BalancedLoss, "embedding", "labels"),
        (PrototypeCrossEntropyLoss, "logits", "soft"),
    ),
)
def test_a_compiled_training_step_takes_a_smaller_last_batch(loss, training_output, target):
    torch.compiler.reset()
    models = [small("rows", training_output) for _ in range(2)]
    criteria = [loss(DynamicAssigner(model)) for model in models]
    steps = [lambda batch, target, i=i: criteria[i](models[i](batch), target) for i in range(2)]
    steps[0] = torch.compile(steps[0], fullgraph=True, backend="eager")
    for size in (16, 16, 7):
        batch, labels = batch_of("rows", size), torch.arange(size) % NUM_CLASSES
        soft = 0.9 * nn.functional.one_hot(labels, NUM_CLASSES) + 0.1 / NUM_CLASSES
        for step in steps:
            step(batch, soft if target == "soft" else labels).backward()
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(criteria[0].assigner.class_means, criteria[1].assigner.class_means)


@pytest.mark.parametrize(
    ("kind", "mode", "strict"),
    in_front(product(KINDS, MODES, [False, True]), ("rows", "logits", True), ("maps", "eval", False)),
)
def test_exported_with_a_batch_of_any_size(kind, mode, strict):
    model = small(kind, mode)
    twin = copy.deepcopy(model)
    batch_size = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch_size},)
    program = torch.export.export(model, (batch_of(kind, 4),), dynamic_shapes=shapes, strict=strict).module()
    for size in (16, 7, 2):
        batch = batch_of(kind, size)
        torch.testing.assert_close(program(batch), twin(batch))


@kinds
@modes
@torchscript
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own batch norm looks at the batch size
def test_a_trace_takes_other_batch_sizes(kind, mode):
    model = small(kind, mode)
    twin = copy.deepcopy(model)
    example = batch_of(kind, 4)
    traced = torch.jit.trace(model, example, check_trace=False)
    twin(example)  # as tracing did
    for size in (16, 7, 2):
        batch = batch_of(kind, size)
        torch.testing.assert_close(traced(batch), twin(batch))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore")  # torch calls its older exporter deprecated, and its parts
def test_onnx_of_the_older_exporter_takes_other_batch_sizes(kind, dtype):
    model, file = small(kind, "eval").to(dtype), io.BytesIO()
    names = {"input_names": ["images"], "output_names": ["logits"]}
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(model, (batch_of(kind, 4).to(dtype),), file, dynamo=False, dynamic_axes=axes, **names)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # of roundings of the backbone
    for size in (4, 1, 3):
        batch = batch_of(kind, size).to(dtype)
        torch.testing.assert_close(run_onnx(file.getvalue(), batch), model(batch), atol=tolerance, rtol=tolerance)


@needs("a conversion of batch norm to ONNX that today's onnxscript takes", torch="2.11")
@pytest.mark.parametrize("kind", in_front(KINDS, "rows"))
@pytest.mark.filterwarnings("ignore")  # torch's and onnxscript's own deprecations
def test_onnx_of_the_newer_exporter_takes_other_batch_sizes(kind):
    model = small(kind, "eval")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    example = batch_of(kind, 4)
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    for size in (4, 1, 3):
        batch = batch_of(kind, size)
        logits = run_onnx(program.model_proto.SerializeToString(), batch)
        torch.testing.assert_close(logits, model(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@every_model
@pytest.mark.filterwarnings("ignore")  # torch calls its older exporter deprecated, and its parts
def test_timms_export_as_it_comes(name, tmp_path):
    model, path = converted(name).eval(), tmp_path / "model.onnx"
    onnx_export(model, str(path), input_size=(3, 32, 32), batch_size=2, check=False)
    for size in (2, 5, 1):
        batch = images(size)
        torch.testing.assert_close(run_onnx(path, batch), model(batch), atol=1e-4, rtol=1e-4)


@kinds
@modes
def test_a_graph_of_make_fx_is_right_for_its_own_size_and_of_rows_for_others(kind, mode):
    model = small(kind, mode)
    twin = copy.deepcopy(model)
    graph = make_fx(lambda batch: model(batch))(batch_of(kind, 4))
    twin.load_state_dict(model.state_dict())  # tracing ran the model once
    for size in (4, 7, 2) if kind == "rows" else (4,):
        batch = batch_of(kind, size)
        torch.testing.assert_close(graph(batch), twin(batch))


@kinds
@modes
def test_a_graph_of_fx_keeps_the_head_and_follows_the_mode(kind, mode):
    model = small(kind, mode)
    twin = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    for training in (mode == "eval", mode != "eval"):
        graph.train(training), twin.train(training)
        for size in (5, 1):
            batch = batch_of(kind, size)
            torch.testing.assert_close(graph(batch), twin(batch))
    for copied in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        for training in (False, True):
            torch.testing.assert_close(copied.train(training)(batch), copy.deepcopy(graph).train(training)(batch))
    assert list(get_heads(graph)) == ["3"]
    assigner = DynamicAssigner(graph.train(), momentum=None)
    BalancedLoss(assigner)(graph(batch_of(kind, 40)), torch.arange(40) % NUM_CLASSES)
    assert assigner.step().changed > 0
    torch.testing.assert_close(graph.eval()(batch), model.eval()(batch))


@pytest.mark.parametrize("projection", ["linear", "linear+bn"])
def test_a_traced_head_follows_the_mode(projection):
    head = HypersphericalHead(6, NUM_CLASSES, dim=4, projection=projection)
    twin = copy.deepcopy(head)
    graph = torch.fx.symbolic_trace(head)
    for training in (True, False, True):
        graph.train(training), twin.train(training)
        for size in (5, 1):
            rows = torch.randn(size, 6)
            torch.testing.assert_close(graph(rows), twin(rows))


@modes
@pytest.mark.filterwarnings("ignore")  # torch.ao calls itself deprecated
def test_trained_for_quantisation_a_sample_does_not_depend_on_its_batch(mode):
    model, batch = small("rows", mode).train(), batch_of("rows", 16)
    prepared = quantize_fx.prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (batch,))
    for _ in range(3):
        prepared(batch)
    quantised = quantize_fx.convert_fx(prepared.eval())
    alone = torch.cat([quantised(row[None]) for row in batch])
    assert alone.shape == (16, NUM_CLASSES)
    torch.testing.assert_close(quantised(batch), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_criteria_see_through_wrappers(wrap):
    model = converted("test_resnet")
    assert DynamicAssigner(wrap(model)).head is DynamicAssigner(model).head


def test_test_time_pooling_is_refused_and_the_advice_works():
    model = converted("test_resnet").eval()
    with pytest.raises(HyperprotoError, match="to_linear"):
        layers.TestTimePoolHead(model)
    assert layers.TestTimePoolHead(to_linear(model), original_pool=1)(images()).shape == (2, NUM_CLASSES)
