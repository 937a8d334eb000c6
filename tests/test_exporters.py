"""timmx, which turns a timm model and a checkpoint into formats of other runtimes: what `to_linear` leaves goes there.

Formats that run on a CPU, where `pip install hyperproto[exporters]` has put them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from hyperproto import convert_model, to_linear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of exporters and runtimes

NAME, NUM_CLASSES, SIZE = "resnet18", 10, (3, 64, 64)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def run_openvino(path: Path, images: Tensor) -> Tensor:
    import openvino

    # On a CPU with bfloat16 it would use that.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(images.numpy())[0])


def run_torchscript(path: Path, images: Tensor) -> Tensor:
    return torch.jit.load(path)(images)


def run_torch_export(path: Path, images: Tensor) -> Tensor:
    return torch.export.load(path).module()(images)


def run_executorch(path: Path, images: Tensor) -> Tensor:
    from executorch.runtime import Runtime

    [logits] = Runtime.get().load_program(path).load_method("forward").execute([images])
    return logits


def run_ncnn(path: Path, images: Tensor) -> Tensor:
    import ncnn

    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(path / "model.ncnn.param"))
    net.load_model(str(path / "model.ncnn.bin"))
    extractor = net.create_extractor()
    extractor.input(net.input_names()[0], ncnn.Mat(images[0].numpy()))
    return torch.tensor(extractor.extract(net.output_names()[0])[1].numpy())[None]


#: By timmx's name of the format: what has to be installed, the ending of what is written, and what runs it.
FORMATS: dict[str, tuple[tuple[str, ...], str, Callable[[Path, Tensor], Tensor]]] = {
    "onnx": (("onnxscript", "onnxruntime"), ".onnx", run_onnx),
    "openvino": (("openvino",), ".xml", run_openvino),
    "torchscript": ((), ".pt", run_torchscript),
    "torch-export": ((), ".pt2", run_torch_export),
    "executorch": (("executorch",), ".pte", run_executorch),
    "ncnn": (("ncnn", "pnnx"), "", run_ncnn),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_folded_model_goes_where_plain_models_go(name, tmp_path):
    packages, ending, run = FORMATS[name]
    timmx = pytest.importorskip("timmx", reason="timmx is not installed: pip install hyperproto[exporters]")
    for package in packages:
        pytest.importorskip(package, reason=f"timmx[{name}] is not installed: pip install hyperproto[exporters]")
    model = convert_model(timm.create_model(NAME, num_classes=NUM_CLASSES), dim=5)
    for _ in range(3):
        model(torch.randn(8, *SIZE))
    images = torch.randn(1, *SIZE)
    model.eval()
    with torch.no_grad():
        ranking = model(images).argsort()
        folded = to_linear(model)
        expected = folded(images)
    checkpoint, output = tmp_path / "folded.pt", tmp_path / f"exported{ending}"
    torch.save(folded.state_dict(), checkpoint)
    written = timmx.export_model(
        name, NAME, checkpoint=str(checkpoint), num_classes=NUM_CLASSES, input_size=SIZE, output=str(output)
    )
    found = run(Path(written), images)
    torch.testing.assert_close(found, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
    assert found.argmax() == ranking[0, -1]
