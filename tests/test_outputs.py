"""Outputs that no head returns are refused, and whatever a head does return is taken."""

import pytest
import torch
from clouds import batch, make_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperproto import (
    ArgumentError,
    BalancedLoss,
    DynamicAssigner,
    HyperprotoWarning,
    HypersphericalHead,
    PrototypeBank,
    PrototypeCrossEntropyLoss,
)
from hyperproto.testing import SEEDS


@pytest.mark.parametrize("factor", [1.1, 100.0])
@pytest.mark.parametrize("training_output", ["logits", "embedding"])
def test_outputs_beyond_any_cosine_are_refused(factor, training_output):
    head = HypersphericalHead(8, 6, dim=3, training_output=training_output)
    features, labels = batch()
    output = nn.functional.normalize(torch.ones(32, 3)) if training_output == "embedding" else head(features)
    scale = 1.0 if training_output == "embedding" else float(head.logit_scale / output.detach().abs().max())
    assigner = DynamicAssigner(head)
    kind, width = ("embeddings", 3) if training_output == "embedding" else ("logits", 6)
    words = rf"^expected {kind} of this head: .* in \[-1, 1\], .* given as {kind} \(B, {width}\) are neither\. Pass"
    with pytest.raises(ArgumentError, match=words):
        BalancedLoss(assigner)(factor * scale * output, labels)
    assert not assigner.class_counts.any()
    BalancedLoss(assigner)(scale * output, labels)


@given(
    width=st.sampled_from([3, 8, 20]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=SEEDS
)
def test_what_a_head_returns_is_never_refused(width, dtype, seed):
    model = make_model(num_classes=width, dim=8, bank="random", seed=seed % 1000)
    output = model(batch(seed=seed)[0])
    labels = batch(num_classes=width)[1]
    for each in (output, 0.3 * output + 0.7 * output.flip(0), torch.zeros_like(output), output[:0]):
        BalancedLoss(model)(each.to(dtype), labels[: len(each)])


def test_what_is_not_finite_passes_for_a_gradient_scaler_to_see():
    model = make_model()
    output = model(batch()[0]).detach()
    for value in (float("nan"), float("inf")):
        output[0, 0] = value
        assert not torch.isfinite(BalancedLoss(model)(output, batch()[1]))


def test_as_wide_as_each_other_embeddings_and_logits_are_told_apart_by_length():
    features, labels = batch()
    head = HypersphericalHead(8, 4, dim=4)
    with pytest.raises(ArgumentError, match="as wide as this head's embeddings, too"):
        BalancedLoss(head)(head.embed(features), labels)
    with pytest.warns(HyperprotoWarning, match="saves nothing"):
        head = HypersphericalHead(8, 4, dim=4, training_output="embedding")
    embeddings, logits = head(features), head.eval()(features)
    with pytest.raises(ArgumentError, match="as wide as"):
        BalancedLoss(head)(embeddings, labels)
    BalancedLoss(head)(logits, labels)
    head.train()
    with pytest.raises(ArgumentError, match="as wide as this head's logits, too"):
        BalancedLoss(head)(logits, labels)
    BalancedLoss(head)(embeddings, labels)


def test_orthonormal_prototypes_at_scale_one_have_logits_of_length_one():
    head = HypersphericalHead(4, 4, bank=PrototypeBank.from_tensor(torch.eye(4)), projection="linear", logit_scale=1.0)
    PrototypeCrossEntropyLoss(head)(head(torch.randn(5, 4)), torch.tensor([0, 1, 2, 3, 0]))
