"""Keeps an accelerator's queue short, so that a request to stop is not answered long after."""

from collections import deque

import torch


class QueueLimit:
    """Called once per layer: returns when at most `layers` of them are still queued on a CUDA or ROCm device.

    Without it Python runs ahead by a whole step. A queue of two layers is enough to keep the device busy. Elsewhere it
    does nothing: a CPU has no queue, other devices have no events to wait for.
    """

    def __init__(self, layers: int = 2) -> None:
        self.layers = layers
        self._events: deque[torch.cuda.Event] = deque()

    def __call__(self, device: torch.device) -> None:
        """`device`: the one that computed the layer before."""
        if device.type != "cuda":
            return
        event = torch.cuda.current_stream(device).record_event()
        self._events.append(event)
        if len(self._events) > self.layers:
            self._events.popleft().synchronize()
