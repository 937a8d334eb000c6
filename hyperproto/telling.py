"""Warnings that point at the user's line, however many frames of this library lie between."""

from __future__ import annotations

import sys
import warnings

from hyperproto.errors import HyperprotoWarning


def tell(message: str) -> None:
    """Emit a `HyperprotoWarning` whose line is that of the first caller outside of the library.

    Args:
        message: what was seen, what it means and what to do.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HyperprotoWarning, stacklevel=level)


def _is_inside(module: str) -> bool:
    # Functions decorated with `torch.no_grad()` are called by the last of these.
    return module.startswith("hyperproto.") or module == "torch.utils._contextlib"
