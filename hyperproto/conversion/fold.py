"""Fold a head into a plain layer, for deployment without this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperproto.affine import affine, typical_length
from hyperproto.conversion.channels import ChannelsFirstHead
from hyperproto.conversion.locate import Leaf, put_in_place
from hyperproto.conversion.record import RECORD, get_record
from hyperproto.conversion.structures import CONFIGURATIONS
from hyperproto.errors import ArgumentError
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads


def to_linear(model: nn.Module) -> nn.Module:
    r"""Replace the head by a plain layer with the same ranking of classes for every input; in place.

    $$ \text{logits}_k = \tfrac{s}{\ell} \, \langle A x + b, w_{\sigma(k)} \rangle $$

    with A and b of the projection and its batch norm in eval mode. This is the head with one length l for all inputs in
    the place of the length of each A x + b: predictions, top-k and rankings are exactly the head's. Probabilities are
    about the head's, on average: l is the typical length of A x + b over the training data, which batch norm's
    statistics tell. Inputs with longer features come out surer than the head is, those with shorter ones less sure.
    Without batch norm at the projection's end nothing tells l, which is then 1: fit a temperature to the plain layer's
    logits if its probabilities matter. The layer is an nn.Linear, or an nn.Conv2d of size 1 where the original one was.

    The model's `state_dict` then loads into an unconverted model of the same architecture and number of classes
    (SqueezeNet aside, whose rebuilt classifier stays). VOLO's token classifier comes back with zeros for weights, which
    add nothing. The conversion cannot be undone afterwards: deepcopy the model first to keep it.

    Args:
        model: a model converted by `convert_model`, with one head.

    Returns:
        The same model.

    Raises:
        ArgumentError: the model combines several heads, each of which normalises on its own: no linear layers rank
            as their sum does. Or its projection is not affine: no linear layer ranks as that does.
        HeadNotFoundError: the model was not converted, or it is wrapped: pass the model inside.

    Examples:
        >>> from hyperproto import convert_model
        >>> model = convert_model(nn.Sequential(nn.Linear(16, 4)), dim=2, classifier="0").eval()
        >>> images = torch.randn(8, 16)
        >>> before = model(images).argmax(dim=1)
        >>> torch.equal(to_linear(model)(images).argmax(dim=1), before), type(model[0]).__name__
        (True, 'Linear')
    """
    record = get_record(model, "to_linear")
    heads = get_heads(model)
    if len(heads) > 1:
        raise ArgumentError(
            f"expected a model with one head, got {len(heads)} ({', '.join(heads)}): {type(model).__name__} sums their "
            "outputs, each normalised on its own, and no linear layers rank classes as that sum does. "
            "Deploy it with hyperproto, e.g. through torch.export."
        )
    [head] = heads.values()
    layer = _fold(head, record.witness(head))
    # Guards on the model and around the head go; what a plain layer needs as well stays.
    for change in record.changes:
        if change.table == "" and change.key in ("fuse", "reset_classifier", *CONFIGURATIONS):
            change.undo()
    if record.load_check is not None:
        record.load_check.remove()
    put_in_place(model, head, layer)
    for dropped in record.dropped:
        zeros = torch.zeros_like(layer.weight.detach().flatten(1))
        silent = _layer(zeros, zeros[:, 0].clone(), channels_first=False).train(layer.training)
        setattr(model, dropped, silent)
    del model.__dict__[RECORD]
    return model


@torch.no_grad()
def _fold(head: HypersphericalHead, witness: Tensor | None) -> Leaf:
    """The head as a layer with the witness's device and dtype."""
    matrix, shift = affine(head.projection, head.in_features)
    length = typical_length(head.projection) or 1.0
    prototypes = float(head.logit_scale) / length * head.class_prototypes.cpu().double()  # (C, D)
    weight, bias = (prototypes @ part for part in (matrix, shift))  # (C, in_features), (C,)
    layer = _layer(weight, bias, channels_first=isinstance(head, ChannelsFirstHead))
    if witness is None:
        witness = head.logit_scale
    return layer.to(device=witness.device, dtype=witness.dtype).train(head.training)


def _layer(weight: Tensor, bias: Tensor, *, channels_first: bool) -> Leaf:
    """nn.Linear or nn.Conv2d of size 1 with this weight (out, in) and bias (out,); draws no random numbers."""
    outputs, inputs = weight.shape
    layer: Leaf
    if channels_first:
        layer = nn.Conv2d(inputs, outputs, 1, device="meta")
        weight = weight[:, :, None, None]
    else:
        layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer
