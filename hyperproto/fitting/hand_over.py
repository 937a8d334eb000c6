"""Hand a teacher's answers on to unit class vectors behind a projection onto the sphere."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.teacher import Teacher
from hyperproto.fitting.temperature import SCALE_BOUNDS
from hyperproto.fitting.unit_head import UnitHead

#: Scales of the cosines while answers are handed on, as shares of the teacher's own. With more of it a head follows the
#: teacher further than is good, on few samples; with less it cannot say what a teacher of many samples says. Prototypes
#: of a simplex, behind which a fit starts as the teacher, have a choice; others have the first.
SHARES_OF_SCALE = (0.75, 1.0)

#: It is never less. Of few samples a teacher is unsure of everything, and a head that is as unsure tells classes apart
#: less well than it.
SMALLEST_SCALE = 6.0

#: Iterations: what is not reached by then is not worth having.
MOST_ITERATIONS = 30

#: Directions that class vectors span by less than this share of the widest one stay out of where a fit starts. A
#: penalty may leave of them what is next to nothing, whose inverse would drown all others.
SMALLEST_SPANNING = 0.05


def scales_for(teacher: Teacher, samples: Samples, *, is_exact: bool) -> tuple[float, ...]:
    """Scales of the cosines at which a teacher's answers may be handed on.

    Args:
        teacher: whose answers.
        samples: that it was fitted to.
        is_exact: whether what starts as the teacher can say all that it says, but for lengths.
    """
    own = teacher.scale(samples)
    shares = SHARES_OF_SCALE if is_exact else SHARES_OF_SCALE[:1]
    return tuple(min(max(SMALLEST_SCALE, share * own), SCALE_BOUNDS[1]) for share in shares)


def hand_over(
    teacher: Teacher,
    start: UnitHead,
    samples: Samples,
    log_prior: Tensor,
    *,
    scale: float,
    iterations: int,
    free_vectors: Tensor,
    intercept: bool,
) -> UnitHead:
    r"""A head whose answers are the teacher's, as far as unit vectors can give them.

    $$ \min_{A, a, W} \; \sum_i w_{y_i} \operatorname{CE}(p_i, \operatorname{softmax}(s \cos(A \tilde x_i + a, w_k))) $$

    with the teacher's probabilities p. They say of each sample what all samples of its like say, so that there is
    nothing to overfit.

    Args:
        teacher: whose answers are handed on.
        start: where L-BFGS starts from.
        samples: labelled features; of the labels the weights are taken.
        log_prior: (C,) added to the logits of both.
        scale: s.
        iterations: at most so many.
        free_vectors: (S,) int64, rows of W that are fitted. Those of labels without samples stay where they are: all
            that a fit knows of them is that they are away from the data, and it would bring them together.
        intercept: whether a is free, or stays as it is.
    """
    matrix, offset, free = start.matrix.clone(), start.offset.clone(), start.vectors[free_vectors]
    parameters = [matrix, *([offset] if intercept else []), *([free] if len(free) else [])]

    def fitted() -> UnitHead:
        return replace(start, matrix=matrix, offset=offset, vectors=start.vectors.index_copy(0, free_vectors, free))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answers = (teacher.logits(features) + log_prior).softmax(dim=1)
        return F.cross_entropy(scale * fitted().cosines(features) + log_prior, answers, reduction="none")

    for parameter in parameters:
        parameter.requires_grad_(True)
    samples.descend(loss, parameters, iterations=iterations, at_a_time=iterations, smallest_gain=0.0)
    return replace(start, matrix=matrix.detach(), offset=offset.detach(), vectors=fitted().vectors.detach())


def start_with_free_vectors(teacher: Teacher, dim: int, seen: Tensor) -> UnitHead:
    """The teacher's own factors, and its bias as far as they express it.

    Labels without samples (those not in `seen`) start apart from each other, in directions drawn at random.
    """
    vectors, bias = teacher.vectors.cpu().double(), teacher.bias.cpu().double()
    offset = torch.linalg.pinv(vectors, rtol=SMALLEST_SPANNING) @ (bias - bias.mean())
    length = vectors[seen].norm(dim=1).mean()
    unseen = torch.ones(len(vectors), dtype=torch.bool, device="cpu").index_fill_(0, seen, False)
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(vectors.shape, generator=generator, dtype=torch.float64, device="cpu")
    vectors = torch.where(unseen[:, None], length * F.normalize(drawn, dim=1), vectors)
    # There are dimensions that the teacher does without where there are more of them than labels, or features.
    missing, device = dim - vectors.shape[1], teacher.bias.device
    return UnitHead(
        teacher.coordinates,
        F.pad(teacher.matrix, (0, 0, 0, missing)),
        F.pad(offset, (0, missing)).float().to(device),
        F.pad(vectors, (0, missing)).float().to(device),
    )


def start_with_prototypes(teacher: Teacher, class_prototypes: Tensor, *, intercept: bool) -> UnitHead:
    """The projection behind which prototypes (C, D) come nearest to the teacher's logits, less their mean.

    Where the prototypes span C - 1 dimensions, as those of a simplex do, classes are ranked as by the teacher.
    """
    frame = class_prototypes.cpu().double()
    inverse = torch.linalg.pinv(frame - frame.mean(dim=0), rtol=SMALLEST_SPANNING)  # (D, C)
    matrix = (inverse @ teacher.vectors.cpu().double()) @ teacher.matrix.cpu().double()
    offset = inverse @ teacher.bias.cpu().double() if intercept else torch.zeros_like(inverse[:, 0])
    device = class_prototypes.device
    return UnitHead(teacher.coordinates, matrix.float().to(device), offset.float().to(device), class_prototypes)
