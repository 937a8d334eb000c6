"""What every construction asks of its numbers."""

from __future__ import annotations

from hyperproto.errors import BankError


def check_size(num_prototypes: int, dim: int) -> None:
    """Raise unless at least two prototypes are wanted in at least two dimensions.

    Raises:
        BankError: otherwise.
    """
    if dim < 2:
        raise BankError(
            f"expected dim >= 2, got dim={dim}: on a line there are only two directions, and no way from one to the "
            "other. Use dim >= 2, also for two classes."
        )
    if num_prototypes < 2:
        raise BankError(
            f"expected at least 2 prototypes, got {num_prototypes}: one direction cannot tell classes apart."
        )
