"""Float32 islands: comparing directions happens in float32, whatever autocast or `model.half()` say.

Eight bits of mantissa move a cosine by 0.4 %, which is more than what separates neighbouring classes of a large
bank, and in float16 the usual `clamp(norm, 1e-8)` is a clamp to zero.

How a device multiplies float32 is left to `torch.set_float32_matmul_precision` and its like: what a script sets there
is meant for all its products, and a global setting is not a library's to change. Where TF32 is allowed, factors keep
11 bits and a cosine is off by 2^-9 at most; "highest", torch's default, gives all of float32.

A model scripted by `torch.jit.script` is an exception: TorchScript cannot leave autocast by a context chosen at run
time. Scripted heads compute in float32 in half-precision models as others do, but under autocast their matrix
products run in its dtype.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast of this device is off; costs nothing where it is off already.

    Examples:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    # Entering a disabled autocast unconditionally would leave a higher-order op in every exported graph.
    # "meta" has none, and to ask is an error; torch.amp.is_autocast_available is a graph break before torch 2.14.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def keeping_dtype(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` as `nn.Module._apply` gets it, less its change of dtype: moves between devices still happen.

    Examples:
        >>> keeping_dtype(torch.Tensor.half)(torch.ones(1)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        result = function(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved
