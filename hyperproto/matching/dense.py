"""Linear sum assignment over the whole (C, P) matrix of cosines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: What keeping its prototype is worth to a label, as a share of the largest similarity. It breaks ties and nothing
#: else: cosines are float32, whose rounding is five orders of magnitude larger.
STAY_BONUS = 1e-12


def solve_dense(similarity: Tensor, current: Tensor) -> Tensor:
    r"""Injective map sigma that maximises the total similarity; exact.

    $$ \max_\sigma \sum_c S_{c, \sigma(c)} $$

    Among maps of equal total the one that moves fewest labels is taken, so that labels without any similarity (never
    seen) stay where they are unless another label gains by taking their prototype.

    Args:
        similarity: (C, P) float64 on the CPU, P >= C.
        current: (C,) int64, the assignment to stay close to.

    Returns:
        (C,) int64.

    Examples:
        >>> solve_dense(torch.tensor([[0.9, 0.8], [0.7, 0.1]]).double(), torch.tensor([0, 1])).tolist()
        [1, 0]

    References:
        Kuhn, The Hungarian method for the assignment problem, 1955 (here scipy's shortest augmenting paths).
    """
    from scipy.optimize import linear_sum_assignment

    gains: npt.NDArray[np.float64] = similarity.numpy().copy()
    largest = float(abs(gains).max(initial=0.0))
    gains[range(len(current)), current.numpy()] += STAY_BONUS * (largest or 1.0)
    _, columns = linear_sum_assignment(gains, maximize=True)
    return torch.from_numpy(columns.astype("int64"))
