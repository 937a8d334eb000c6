"""The first block of README.md, without the download."""

from pathlib import Path

import torch

from hyperproto import get_heads


def test_the_first_block_trains_a_model():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert block.count("pretrained=True") == 1
    labels = torch.arange(200) % 100
    images = torch.randn(200, 3, 32, 32) + labels[:, None, None, None] / 10.0
    loader = list(zip(images.split(50), labels.split(50), strict=True))
    names = {"loader": loader, "epochs": 1}
    exec(block.replace("pretrained=True", "pretrained=False"), names)
    [head] = get_heads(names["model"]).values()
    assert (head.num_classes, head.dim, head.bank.method) == (100, 50, "given")
    assert torch.isfinite(names["loss"])
    assert len(names["assigner"].history) == 1
