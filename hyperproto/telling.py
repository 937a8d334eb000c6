"""Warnings that point at the user's line, however many frames of this library lie between."""

from __future__ import annotations

import sys
import warnings

from hyperproto.errors import HyperprotoWarning


def tell(message: str) -> None:
    """Give a `HyperprotoWarning` that points at the line which called into this library.

    Who warns sees to it that an object says the same only once: Python itself would keep quiet about the next object
    that meets the same line.

    Args:
        message: what was seen, what it means and what to do.
    """
    frame = sys._getframe()
    # Functions decorated with `torch.no_grad()` are called from within torch, as are modules.
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hyperproto", "torch"):
        frame = frame.f_back
    module = frame.f_globals.get("__name__")
    warnings.warn_explicit(message, HyperprotoWarning, frame.f_code.co_filename, frame.f_lineno, module=module)
