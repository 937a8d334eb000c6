"""A step that is run very often, as one CUDA graph."""

from collections.abc import Callable

import torch

#: Calls before a step is captured: libraries choose their kernels, and optimisers make their state.
WARM_UP = 3


def captured(step: Callable[[], object], stream: torch.cuda.Stream | None) -> Callable[[], object]:
    """`step`, called `WARM_UP` times, and from then on as a CUDA graph of the stream; without a stream as it is.

    The step must read and write the same tensors at each call, and must not wait for the GPU.

    Args:
        step: is called without arguments.
        stream: on which it is warmed up, captured and to be replayed. Runs that replay at the same time need streams of
            their own, since libraries keep a workspace for each.
    """
    if stream is None:
        for _ in range(WARM_UP):
            step()
        return step
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
