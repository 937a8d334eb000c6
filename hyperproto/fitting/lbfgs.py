"""Fit a few tensors to features that are all at hand, without a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.ranks import ProcessGroup, add_up_ranks, steered_by_first

#: Of features (N, F) and labels (N,), a loss for each (N,).
SampleLoss = Callable[[Tensor, Tensor], Tensor]

#: Features (N, F) and labels (N,) int64, both where what is fitted is.
Batches = list[tuple[Tensor, Tensor]]

#: Steps whose curvature L-BFGS remembers: two copies of what is fitted each.
HISTORY = 20


@dataclass(frozen=True)
class Samples:
    """Labelled features of this rank, and what each counts among those of all ranks.

    Attributes:
        batches: their sizes matter to memory only.
        weights: (C,) float32 of a sample of each class; those of all samples add up to 1.
        process_group: the ranks that share out the samples.
    """

    batches: Batches
    weights: Tensor
    process_group: ProcessGroup | None

    @classmethod
    def weighed(
        cls,
        batches: Batches,
        num_classes: int,
        device: torch.device,
        *,
        alike: bool,
        process_group: ProcessGroup | None,
    ) -> Samples:
        """With weights by which classes count alike, or samples do."""
        counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        for _, labels in batches:
            counts += labels.bincount(minlength=num_classes)
        add_up_ranks([counts], device, process_group=process_group)
        weights = 1.0 / (counts * counts.count_nonzero()) if alike else torch.ones_like(counts) / counts.sum()
        return cls(batches, weights, process_group)  # infinite where there is no sample to weigh

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum over the ranks, in place."""
        add_up_ranks(tensors, self.weights.device, process_group=self.process_group)

    @torch.no_grad()
    def mean(self, value: SampleLoss) -> float:
        """Weighted mean over all ranks' samples; infinity where it is not a number, zero without samples."""
        total = torch.zeros((), dtype=torch.float32, device=self.weights.device)
        for features, labels in self.batches:
            total += (value(features, labels) * self.weights[labels]).sum()
        self.add_up([total])
        return float(total) if bool(torch.isfinite(total)) else math.inf

    def descend(
        self,
        loss: SampleLoss,
        parameters: list[Tensor],
        *,
        iterations: int,
        at_a_time: int,
        smallest_gain: float,
        penalty: float = 0.0,
    ) -> None:
        r"""L-BFGS on the weighted mean of a loss and a penalty on lengths; in place, a round of iterations at a time.

        $$ \min_\theta \sum_i w_{y_i} \, \ell_\theta(x_i, y_i) + \tfrac{\lambda}{2} \lVert \theta \rVert^2 $$

        Nothing is drawn: the same features, the same result. Under torch.distributed all ranks take the first one's
        steps, and end with its parameters.

        Args:
            loss: differentiable in the parameters, which it reads.
            parameters: leaves that require gradients, all of one dtype and on one device.
            iterations: at most so many; each costs one or two passes over the samples.
            at_a_time: of a round.
            smallest_gain: share of the objective; a round that has gained less is followed by one more, the last.
            penalty: lambda.

        References:
            Liu, Nocedal, On the limited memory BFGS method for large scale optimization, 1989.
        """
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

        @torch.enable_grad()
        def evaluate() -> Tensor:
            total = parameters[0].new_zeros(())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            for gradient in gradients:
                gradient.zero_()
            for features, labels in self.batches:
                part = (loss(features, labels) * self.weights[labels]).sum()
                part.backward()  # type: ignore[no-untyped-call]
                total += part.detach()
            self.add_up([total, *gradients])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                gradient.add_(parameter.detach(), alpha=penalty)
                total += 0.5 * penalty * parameter.detach().square().sum()
            return total

        def steer(evaluate: Callable[[], Tensor]) -> None:
            optimizer = torch.optim.LBFGS(parameters, history_size=HISTORY, line_search_fn="strong_wolfe")
            [options], before = optimizer.param_groups, math.inf
            for done in range(0, iterations, at_a_time):
                options["max_iter"] = min(at_a_time, iterations - done)
                options["max_eval"] = 3 * options["max_iter"]
                begun = float(optimizer.step(evaluate))  # type: ignore[no-untyped-call]
                if not before - begun > smallest_gain * abs(begun):
                    return
                before = begun

        steered_by_first(steer, evaluate, parameters, process_group=self.process_group)
