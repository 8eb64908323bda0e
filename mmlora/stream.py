"""`Stream`: the outputs of one request on their way from the engine thread to an event loop."""

import asyncio
import logging
from collections.abc import Callable

from mmlora.errors import MMLoRAError
from mmlora.outputs import RequestOutput

logger = logging.getLogger(__name__)


class Stream:
    """Carries outputs of one request to the event loop in which it was made.

    Args:
        on_output: told of each output when it reaches the loop, also when nobody waits for it any more.
    """

    def __init__(self, on_output: Callable[[RequestOutput], None]) -> None:
        self._on_output = on_output
        self.is_aborted = False  # before the engine knew of it
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[RequestOutput | MMLoRAError] = asyncio.Queue()

    def put(self, output: RequestOutput | MMLoRAError) -> None:
        """Hand over an output; called by the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, output)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("an output was dropped: its event loop is closed")

    def _receive(self, output: RequestOutput | MMLoRAError) -> None:
        self._outputs.put_nowait(output)  # first: it arrives whatever becomes of the rest
        if isinstance(output, RequestOutput):
            self._on_output(output)

    async def get(self) -> RequestOutput:
        """Wait for the next output.

        Raises:
            MMLoRAError: the request could not be queued, or the engine died.
        """
        output = await self._outputs.get()
        if isinstance(output, MMLoRAError):
            raise output
        return output
