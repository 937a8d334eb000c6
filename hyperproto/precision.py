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

from hyperproto.errors import ShapeError


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

    What is in float64 is in float32 on a device that has no other.

    Examples:
        >>> keeping_dtype(torch.Tensor.half)(torch.ones(1)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        try:
            result = function(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)
        except TypeError:  # what torch says of float64 on a device without
            if tensor.dtype != torch.float64:
                raise
            return moved(tensor.float())

    return moved


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (Apple's GPUs): what counts are kept in.

    float32 cannot tell 16,777,217 from 16,777,216.

    Examples:
        >>> widest_float(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def check_full_precision(scale: Tensor) -> None:
    """Raise unless a buffer that no method of a module casts is float32 still.

    Raises:
        ShapeError: something has cast the buffers behind the module's back.
    """
    if scale.dtype != torch.float32:
        raise ShapeError(
            f"expected the head's buffers in float32, as every cast of a model leaves them, got {scale.dtype}: "
            "FullyShardedDataParallel with MixedPrecision(buffer_dtype=...) casts them, and prototypes lose what no "
            "cast brings back. Convert and wrap the model again, without buffer_dtype."
        )
