"""The way of a CUDA device's vectors to work that only the host can do, and back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication._flight import Flight
from lightning_easgd.communication._line import new_stream

__all__ = ["Ferry"]


class Ferry:
    """Brings a CUDA device's vectors to pinned memory and back, on a stream and in a thread beside the caller's.

    Args:
        like: has the vectors' length and dtype.
        device: where they are.

    Attributes:
        host: (d,) pinned; one vector at a time is in it.
    """

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self._stream: Any = new_stream(device)  # its methods are not typed
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lightning_easgd-exchange")

    def carry(self, x: Tensor, exchange: Callable[[Tensor], None]) -> Flight:
        """Has ``exchange`` work in place on what is in ``x`` (d,), on the device; returns at once."""
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(self._stream)

        def there_and_back() -> None:
            torch.cuda.set_device(x.device)  # a thread begins with device 0
            self._stream.synchronize()
            exchange(self.host)
            with torch.cuda.stream(self._stream):
                x.copy_(self.host, non_blocking=True)
            self._stream.synchronize()

        return Flight(there_and_back, self._worker.submit)

    def close(self) -> None:
        """Waits for the operation under way; the peer of that operation has been told to give up."""
        self._worker.shutdown()
