"""open_clip: image towers built on timm."""

import pytest
import torch
from inside import block

from hyperproto import convert_model, get_heads

towers = pytest.importorskip("open_clip.timm_model", reason='open_clip is one of the extra "frameworks"')


@pytest.mark.parametrize(("projection", "name"), [("linear", "head.proj"), ("mlp", "head.mlp.fc2"), ("", "trunk.head")])
def test_the_last_layer_is_found(projection, name):
    tower = towers.TimmModel("test_vit", embed_dim=16, image_size=160, proj=projection)
    convert_model(tower, dim=4, num_classes=6)
    assert list(get_heads(tower)) == [name]


def test_the_page():
    space: dict = {}
    exec(block("open_clip"), space)
    assert space["tower"].eval()(torch.randn(2, 3, 160, 160)).shape == (2, 6)
