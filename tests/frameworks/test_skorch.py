"""skorch: probabilities, and copies of module and criterion one by one."""

import copy

import numpy as np
import pytest
import torch
from inside import NUM_CLASSES, block, network, samples

import hyperproto

skorch = pytest.importorskip("skorch", reason='skorch is one of the extra "frameworks"')
sklearn = pytest.importorskip("sklearn.base", reason="skorch needs scikit-learn")


def arrays():
    images, labels = samples()
    return images.numpy(), labels.numpy()


def test_probabilities_are_those_of_a_softmax():
    model = hyperproto.convert_model(network(), classifier="fc", dim=4)
    net = skorch.NeuralNetClassifier(
        model, criterion=hyperproto.PrototypeCrossEntropyLoss(model), train_split=None, max_epochs=1, verbose=0
    )
    images, labels = arrays()
    expected = net.fit(images, labels).module_.eval()(torch.from_numpy(images)).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(net.predict_proba(images), expected, atol=1e-6)


def test_a_copied_criterion_never_steps_a_head_that_nobody_uses():
    model = hyperproto.convert_model(network(), classifier="fc", dim=4)
    criterion = hyperproto.BalancedLoss(hyperproto.DynamicAssigner(model))
    net = sklearn.clone(skorch.NeuralNetClassifier(model, criterion=criterion, train_split=None, verbose=0))
    with pytest.raises(hyperproto.HyperprotoError):
        net.fit(*arrays()).criterion_.assigner.step()


def test_the_page_also_after_cloning():
    images, labels = arrays()
    space = {"model": network(), "X": images, "y": labels}
    exec(block("skorch"), space)
    assert np.allclose(space["probabilities"].sum(axis=1), 1.0, atol=1e-5)
    assert len(space["net"].criterion_.assigner.history) == 2
    copied = sklearn.clone(copy.deepcopy(space["net"])).fit(images, labels)
    assert copied.criterion_.head is copied.module_.fc
    assert copied.criterion_.assigner.class_counts.tolist() == [2.0 * len(labels) / NUM_CLASSES] * NUM_CLASSES
