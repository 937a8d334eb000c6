"""Where prototypes come from: pure generators of (P, D) unit rows, and the registry of their names.

Each is called as `generator(num_prototypes, dim, random_generator)` and returns float32 on the CPU; it checks that it
can serve these numbers and raises `BankError` where it cannot. All randomness comes from the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from hyperproto.constructions.code import code_points, has_code
from hyperproto.constructions.energy import energy_points
from hyperproto.constructions.hpn import hpn_points
from hyperproto.constructions.orthoplex import orthoplex_points
from hyperproto.constructions.random import random_points
from hyperproto.constructions.separated import separated_points
from hyperproto.constructions.simplex import simplex_points
from hyperproto.constructions.uniform import uniform_points

CONSTRUCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "simplex": simplex_points,
        "orthoplex": orthoplex_points,
        "separated": separated_points,
        "uniform": uniform_points,
        "energy": energy_points,
        "hpn": hpn_points,
        "code": code_points,
        "random": random_points,
    }
)

#: An optimiser's step costs P^2 D, and a build takes hundreds of steps. Where no code serves more prototypes than this
#: (in few dimensions), what is left is chance.
MOST_OPTIMISED_PROTOTYPES = 4096


def choose_method(num_prototypes: int, dim: int) -> str:
    """The construction that "auto" stands for: the optimum where it is known, else the best that can be afforded.

    Args:
        num_prototypes: P.
        dim: D.

    Examples:
        >>> choose_method(10, 9), choose_method(10, 5), choose_method(100, 10), choose_method(100_000, 512)
        ('simplex', 'orthoplex', 'separated', 'code')
    """
    if num_prototypes <= dim + 1:
        return "simplex"
    if num_prototypes <= 2 * dim:
        return "orthoplex"
    if num_prototypes <= MOST_OPTIMISED_PROTOTYPES:
        return "separated"
    return "code" if has_code(num_prototypes, dim) else "random"
