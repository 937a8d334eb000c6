"""torch.compile on a GPU. Apart from the quick tests: each case compiles for many seconds."""

import pytest
import torch
from cases import LOSSES, batch, make_head, training_step

from hyperproto import DynamicAssigner


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("output", ["logits", "embedding"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_steps_go_on_across_an_assignment_step(device, loss, output, mode):
    features, labels = batch(device)
    histories = []
    for compiled in (True, False):
        torch.compiler.reset()
        head = make_head(output).to(device)
        assigner = DynamicAssigner(head)
        criterion = LOSSES[loss](assigner)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        model = torch.compile(head, fullgraph=True, mode=mode) if compiled else head

        losses = []
        for number in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            if number == 5:
                moved = assigner.step().changed
            stance = "fail_on_recompile" if number == 5 and compiled else "default"
            with torch.compiler.set_stance(stance):
                losses.append(float(training_step(model, criterion, features, labels, optimizer)))
        assert moved > 0
        histories.append([*losses, *assigner.class_means.flatten().tolist()])
    assert histories[0] == pytest.approx(histories[1], rel=1e-2, abs=1e-3)


@torch.no_grad()
def test_a_compiled_model_follows_its_assignment(device):
    torch.compiler.reset()
    head = make_head().to(device).eval()
    model = torch.compile(head, fullgraph=True, mode="reduce-overhead")
    features = batch(device)[0]
    for seed in range(4):
        head.assign_(torch.randperm(head.num_classes, generator=torch.Generator().manual_seed(seed)).to(device))
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            torch.testing.assert_close(model(features).clone(), head(features), atol=1e-3, rtol=1e-3)
