"""Memory that the images of all running requests may take, reserved before any of them is decoded."""

from __future__ import annotations

from collections.abc import Sequence

from vilavt_core.images import DecodingCost

from ..errors import BusyError, LimitError


class PictureBudget:
    """Used from the server's event loop alone.

    Args:
        max_request_pixels: of all images of one request, as sent.
        max_bytes: of the images of all running requests, what decoding them takes included.
    """

    def __init__(self, max_request_pixels: int, max_bytes: int) -> None:
        self.max_request_pixels, self.max_bytes = max_request_pixels, max_bytes
        self.bytes = 0
        """Reserved now."""

    def reservation(self) -> Reservation:
        """Of one request; nothing is reserved yet."""
        return Reservation(self)


class Reservation:
    """What one request has reserved; released when it ends."""

    def __init__(self, budget: PictureBudget) -> None:
        self._budget, self._bytes = budget, 0

    def take(self, costs: Sequence[DecodingCost], files: int) -> None:
        """Reserve what it takes to decode these, one after the other.

        Args:
            costs: of all images of the request.
            files: bytes of their files, which are in memory meanwhile.

        Raises:
            LimitError: they are more than any request may have.
            BusyError: other requests have too much at the moment.
        """
        budget = self._budget
        pixels = sum(cost.pixels for cost in costs)
        if pixels > budget.max_request_pixels:
            raise LimitError(
                f"the request's {len(costs)} images have {pixels} pixels, at most {budget.max_request_pixels} are "
                "allowed; send smaller ones, or raise it with --max-request-pixels"
            )
        needed = files + sum(cost.held for cost in costs) + max((cost.peak - cost.held for cost in costs), default=0)
        if needed > budget.max_bytes:
            raise LimitError(
                f"decoding the request's {len(costs)} images takes {needed} bytes, at most {budget.max_bytes} are "
                "allowed; send smaller ones, or raise it with --max-picture-memory"
            )
        if budget.bytes - self._bytes + needed > budget.max_bytes:
            raise BusyError(
                f"the images of other questions take {budget.bytes - self._bytes} bytes, this request needs "
                f"{needed}, at most {budget.max_bytes} may be taken; try again later, or raise it with "
                "--max-picture-memory"
            )
        self._set(needed)

    def decoded(self, costs: Sequence[DecodingCost]) -> None:
        """Give back what only decoding needed."""
        self._set(sum(cost.held for cost in costs))

    def release(self) -> None:
        """Give everything back."""
        self._set(0)

    def _set(self, count: int) -> None:
        self._budget.bytes += count - self._bytes
        self._bytes = count
