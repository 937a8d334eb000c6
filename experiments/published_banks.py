"""Banks as papers publish them: their objectives under SGD, stopped after so many steps, wherever that is."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize


def published_prototypes(
    num_prototypes: int, dim: int, objective: Literal["uniformity", "maxima"], *, steps: int = 1000, seed: int = 0
) -> Tensor:
    """(P, D) unit rows that have come some way to the minimum of an objective.

    "uniformity" is the log of the mean Gaussian potential of all pairs (Saadabadi et al. 2024, equations 4 and 5),
    "maxima" the mean of the rows' largest cosines (Mettes et al. 2019). SGD has momentum 0.9 and learning rate 0.1, and
    rows are normalised after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    points = normalize(torch.randn(num_prototypes, dim, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([points], lr=0.1, momentum=0.9)
    off_diagonal = ~torch.eye(num_prototypes, dtype=torch.bool)
    for _ in range(steps):
        optimizer.zero_grad()
        cosines = points @ points.T
        if objective == "uniformity":
            loss = (4.0 * cosines[off_diagonal] - 4.0).exp().mean().log()
        else:
            loss = (cosines - 2.0 * torch.eye(num_prototypes)).amax(dim=1).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            points.copy_(normalize(points))
    return points.detach()
