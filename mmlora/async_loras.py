"""`AsyncLoRAs`: the life cycle of adapters beside the steps of an engine in a thread of its own."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from mmlora.engine.llm_engine import LLMEngine
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.info import LoRAInfo

T = TypeVar("T")


class AsyncLoRAs(ABC):
    """What `AsyncLLM` does with adapters: loaders change the host, the engine thread brings the slots in line."""

    engine: LLMEngine

    @abstractmethod
    async def run_in_pool(self, function: Callable[..., T], *args: Any, is_load: bool = False) -> T:
        """Run blocking work beside the event loop."""

    @abstractmethod
    def _send(self, message: Callable[[], None]) -> None:
        """Have the engine thread run a message between two steps."""

    async def add_lora(
        self,
        lora: str | LoRARequest,
        path: str | None = None,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Load an adapter beside the steps, as `LLM.add_lora` does.

        Raises:
            AdapterError: see there.
            EngineDeadError: the engine has stopped.
        """
        add = functools.partial(self.engine.lora.add, lora, path, tensors=tensors, config=config)
        return await self.change_loras(add)

    async def reload_lora(
        self,
        lora: str | int,
        path: str | None = None,
        *,
        tensors: Mapping[str, torch.Tensor] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Load another version of an adapter beside the steps and swap it in between two, as `LLM.reload_lora` does.

        Raises:
            AdapterError: see there.
            EngineDeadError: the engine has stopped.
        """
        return await self.change_loras(
            functools.partial(self.engine.lora.reload, lora, path, tensors=tensors, config=config)
        )

    async def remove_lora(self, lora: str | int) -> None:
        """Unload an adapter; returns at once, while the memory is freed when the last request with it ends.

        Raises:
            AdapterNotFound: it is unknown.
            EngineDeadError: the engine has stopped.
        """
        await self.change_loras(functools.partial(self.engine.lora.remove, lora))

    async def pin_lora(self, lora: str | int, *, is_pinned: bool = True) -> None:
        """Keep an adapter on the host and in a slot, or let it be evicted again, as `LLM.pin_lora` does.

        Raises:
            AdapterError: see there.
            EngineDeadError: the engine has stopped.
        """
        if is_pinned:
            await self.run_in_pool(self.engine.lora.pin, lora, self._run_in_engine, is_load=True)
        else:
            await self.change_loras(functools.partial(self.engine.lora.unpin, lora))

    async def change_loras(self, change: Callable[[], T]) -> T:
        """Change the host's adapters beside the steps, then have the engine thread bring the slots in line.

        Args:
            change: calls `engine.lora`. Once begun it ends, whether the caller still waits or not.

        Raises:
            EngineDeadError: the engine has stopped.
        """

        def change_and_settle() -> T:
            result = change()
            self._run_in_engine(self.engine.lora.settle)
            return result

        return await self.run_in_pool(change_and_settle, is_load=True)

    async def list_loras(self) -> list[LoRAInfo]:
        """The adapters that are known, as `LLM.list_loras` has them."""
        return self.engine.list_loras()

    def _run_in_engine(self, function: Callable[[], None]) -> None:
        """Run something short between two steps and wait for it, in a loader.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        done: Future[None] = Future()

        def message() -> None:
            try:
                function()
            except BaseException as error:  # whoever waits is told, whatever it is
                done.set_exception(error)
            else:
                done.set_result(None)

        self._send(message)
        done.result()
