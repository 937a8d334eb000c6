"""The one way in which heads are fitted to features at hand: a teacher first, then its answers on the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.errors import ArgumentError
from hyperproto.fitting.data import FitOptions, HeldFeatures
from hyperproto.fitting.hand_over import MOST_ITERATIONS, hand_over, scales_for
from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.report import HeldOut
from hyperproto.fitting.teacher import Teacher, find_teacher, first_teacher, refined
from hyperproto.fitting.temperature import SCALE_BOUNDS
from hyperproto.fitting.unit_head import Coordinates, UnitHead, difference, score, standard_error

#: Apart by less than so many standard errors, accuracies do not differ.
STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class Task:
    """What is fitted to the features of one head of a model.

    Attributes:
        index: number of the head.
        rank: of the teacher.
        present: what there is already, in coordinates.
        start: where a head starts from that is to give a teacher's answers.
        stand_in: a closed form that is judged in the place of what there is, where this was fitted to the judges.
        asks_present: whether what there is may be judged itself. Few components of a head that was fitted to the judges
            do no better on them than one that was not, and worse on others.
        free_vectors: (S,) int64, labels whose class vectors are fitted; the others stay as they are.
        intercept: whether its projection has a free one.
    """

    index: int
    rank: int
    present: Callable[[Coordinates], UnitHead]
    start: Callable[[Teacher], UnitHead]
    stand_in: Callable[[Samples, Coordinates], UnitHead]
    asks_present: bool
    free_vectors: Tensor
    intercept: bool


@dataclass(frozen=True)
class Fit:
    """What came out.

    Attributes:
        head: the fit, or what there was.
        logit_scale: the scale at which held-out samples are as often right as they are sure.
        held_out: what these say; None where there are none.
    """

    head: UnitHead
    logit_scale: float
    held_out: HeldOut | None

    @property
    def is_new(self) -> bool:
        """Whether it is not what there was."""
        return self.held_out is None or self.held_out.is_better


def fit_unit_head(features: HeldFeatures, task: Task, options: FitOptions) -> Fit:
    """A head that gives a teacher's answers, or the present one where these are no better on held-out samples.

    Penalty, `logit_scale` and, among those that suit the teacher, the scale of the cosines meanwhile are chosen on the
    held-out samples. The fit is then made once more with them.

    Args:
        features: that reach the heads.
        task: what is fitted to them.
        options: of the user.

    Raises:
        ArgumentError: the features are too large or too small for float32.
    """
    given_scale, iterations, log_prior = options
    alike = log_prior is None
    fitted_to, everything = (part(task.index, classes_alike=alike) for part in (features.fitted_to, features.all))
    held_out = features.held_out(task.index)
    num_classes, device = len(fitted_to.weights), fitted_to.weights.device
    coordinates = Coordinates.of_samples(features.scatters[task.index], everything, centred=task.intercept)
    prior = torch.zeros(num_classes, device=device) if log_prior is None else log_prior.to(device)
    before = task.present(coordinates)
    if not math.isfinite(score(before, everything).log_loss):
        raise ArgumentError(
            "the features that reach the head are too large or too small for float32; the model is unchanged. Scale "
            "them, or normalise in front of the head."
        )

    first = first_teacher(coordinates, fitted_to, num_classes, task.rank)
    teacher = find_teacher(first, fitted_to, held_out, prior, iterations=iterations)
    is_exact = not len(task.free_vectors) and task.rank >= num_classes - 1
    scales = scales_for(teacher, fitted_to, is_exact=is_exact) if given_scale is None else (given_scale,)

    def pupil(teacher: Teacher, samples: Samples, scale: float) -> UnitHead:
        return hand_over(
            teacher,
            task.start(teacher),
            samples,
            prior,
            scale=scale,
            iterations=min(iterations, MOST_ITERATIONS),
            free_vectors=task.free_vectors,
            intercept=task.intercept,
        )

    if held_out is None:
        return Fit(pupil(teacher, fitted_to, scales[0]), scales[0], None)
    present = score(before, held_out)
    found = {scale: score(pupil(teacher, fitted_to, scale), held_out) for scale in scales}
    scale, unseen = min(found.items(), key=lambda each: each[1].log_loss)
    final = pupil(refined(teacher, everything, prior, iterations=iterations), everything, scale)
    seen = score(final, held_out)
    num_samples = features.num_held_out(task.index)

    rival, was_seen = present, False
    if not task.asks_present or not unseen.is_better_than(present, num_samples=num_samples):
        closed = task.stand_in(fitted_to, coordinates)
        was_seen = (
            not task.asks_present
            or has_seen(present.accuracy, unseen.accuracy, seen.accuracy, num_samples)
            or is_nearer(before, task.stand_in(everything, coordinates), closed, held_out)
        )
        rival = score(closed, held_out) if was_seen else present
    is_better = any(unseen.is_better_than(other, num_samples=num_samples) for other in (rival, present))
    report = HeldOut(
        num_samples=num_samples,
        accuracy_before=rival.accuracy,
        accuracy=unseen.accuracy,
        log_loss_before=rival.log_loss,
        log_loss=unseen.log_loss,
        penalty=teacher.penalty,
        was_seen=was_seen,
        is_better=math.isfinite(seen.log_loss) and is_better,
    )
    head, reached = (final, unseen) if report.is_better else (before, present)
    speaks = given_scale is None and reached.logit_scale not in SCALE_BOUNDS  # at a bound nothing speaks for any
    return Fit(head, reached.logit_scale if speaks else scale, report)


def has_seen(present: float, unseen: float, seen: float, num_samples: int) -> bool:
    """Whether the present head must have been fitted to the held-out samples, so that these say nothing of it.

    It is if its accuracy is nearer to that of a fit with them than to that of one without, where the two differ at all.

    Args:
        present: accuracy of the present head.
        unseen: of a fit without the held-out samples.
        seen: of the same fit with them.
        num_samples: that are held out.

    Examples:
        >>> has_seen(0.95, unseen=0.55, seen=0.90, num_samples=500)
        True
        >>> has_seen(0.64, unseen=0.55, seen=0.90, num_samples=500)  # of more data, perhaps
        False
        >>> has_seen(1.00, unseen=0.95, seen=1.00, num_samples=30)
        False
    """
    return seen - unseen > STANDARD_ERRORS * standard_error(unseen, num_samples) and present > 0.5 * (unseen + seen)


def is_nearer(head: UnitHead, closed: UnitHead, other: UnitHead, samples: Samples) -> bool:
    """Whether a head's cosines are nearer to those of a closed form than another one's are.

    Then it is that closed form: the other lacks a tenth of the samples, which moves it less than other data would.
    """
    return difference(head, closed, samples) < difference(other, closed, samples)
