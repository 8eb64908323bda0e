"""`AsyncLLM`: the engine in a dedicated thread, requests as async iterators of deltas."""

import asyncio
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, get_args

from mmlora.config import EngineArgs
from mmlora.engine.llm_engine import LLMEngine
from mmlora.engine.metrics import OPEN_RECORDS, EngineMetrics, EngineSummary, RequestHistograms, RequestRecord
from mmlora.errors import EngineDeadError, MMLoRAError
from mmlora.inputs.engine_input import EngineInput
from mmlora.inputs.input_processor import Prompt, media_of
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.manager import LoRAInfo, LoRAManager
from mmlora.outputs import RequestOutput
from mmlora.processors.media.loader import PromptMedia
from mmlora.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

PoolName = Literal["input", "media", "large_body", "loader"]
NUM_LOADERS: Final = 16  # most only wait, for a load in another thread or for the end of a step


class RequestStream:
    """Outputs of one request on their way from the engine thread to an event loop.

    Attributes:
        record: what is known about the request, for logs and histograms.
    """

    def __init__(self, record: RequestRecord, histograms: RequestHistograms) -> None:
        self.record = record
        self._histograms = histograms
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[RequestOutput | MMLoRAError] = asyncio.Queue()

    def put(self, output: RequestOutput | MMLoRAError) -> None:
        """Pass an output to the event loop; called by the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, output)
        except RuntimeError:  # the loop is closed, so nothing reads the output
            logger.debug("an output was dropped: its event loop is closed")

    def _receive(self, output: RequestOutput | MMLoRAError) -> None:
        self._outputs.put_nowait(output)  # first, so that it is delivered even if the histograms fail
        if isinstance(output, RequestOutput):
            self._histograms.observe(self.record, output)

    async def get(self) -> RequestOutput:
        """Wait for the next output.

        Raises:
            MMLoRAError: the request could not be queued, or the engine died.
        """
        output = await self._outputs.get()
        if isinstance(output, MMLoRAError):
            raise output
        return output


def _lora_method(
    change: Callable[Concatenate[LoRAManager, P], T],
) -> Callable[Concatenate["AsyncLLM", P], Coroutine[Any, Any, T]]:
    """Wrap a method of `LoRAManager` to run in a loader thread while the engine steps; see `AsyncLLM.change_loras`."""

    @functools.wraps(change)
    async def method(self: "AsyncLLM", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.change_loras(functools.partial(change, self.engine.lora, *args, **kwargs))

    return method


@dataclass(frozen=True)
class PreparedRequest:
    """A request that `AsyncLLM.run` starts.

    The engine thread keeps the stream, not the input, so the last output it delivers does not keep the adapter alive.
    """

    input: EngineInput
    stream: RequestStream


class AsyncLLM:
    """Serves concurrent requests from event loops; `LoRAManager` documents `add_lora` and its companions.

    Attributes:
        engine: the engine, which runs in a thread.
        args: the engine's options.
        tokenizer: the model's `transformers` tokenizer.
        input_processor: validates and processes prompts.
        processor: the model's media processor; None for a text-only model.
        media: loader of the media that requests carry or refer to.
        max_model_len: limit of prompt and output tokens together.
        vocab_size: rows of the model's embedding table.
        transcription_prompt: prompt for transcriptions; None if the model has none.
        default_adapters: by modality key, with the request that names each.
        host_cache: the adapters on the host; None without LoRA.
        histograms: latencies and lengths of the requests.

    Args:
        args: all options of the engine.
        num_workers: threads that process requests with media, and as many for requests of text only; adapters are
            loaded in other threads.

    Raises:
        ConfigError, AdapterError: see `LLMEngine`.
    """

    def __init__(self, args: EngineArgs, *, num_workers: int = 4) -> None:
        self.engine = engine = LLMEngine(args)
        self.args = args
        self.tokenizer = engine.tokenizer
        self.input_processor = engine.input_processor
        self.processor = engine.input_processor.processor
        self.media = engine.input_processor.media
        self.max_model_len = engine.max_model_len
        self.vocab_size = self.input_processor.vocab_size
        self.transcription_prompt = engine.transcription_prompt
        self.default_adapters = engine.default_adapters
        self.host_cache = engine.host_cache
        self.histograms = RequestHistograms()
        self._pools: dict[PoolName, ThreadPoolExecutor] = {
            name: ThreadPoolExecutor(count, thread_name_prefix=f"mmlora-{name}")
            for name, count in zip(get_args(PoolName), (num_workers, num_workers, 1, NUM_LOADERS), strict=True)
        }
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # used by the engine thread only
        self._preparing: list[RequestRecord] = []  # being processed in the pool; used by event loops only
        self._ids = itertools.count()
        self._is_alive = True
        self._is_stopping = False
        self._lock = threading.Lock()  # no message may be queued after the inbox was closed
        self._thread = threading.Thread(target=self._serve, name="mmlora-engine", daemon=True)
        self._thread.start()

    @property
    def model_name(self) -> str:
        """Name of the base model in requests."""
        return self.args.model_name

    @property
    def metrics(self) -> EngineMetrics:
        """A snapshot of the engine's metrics."""
        return self.engine.metrics

    @property
    def known_loras(self) -> list[LoRAInfo]:
        """State of every known adapter, in the order of their first loads; empty without LoRA."""
        return self.engine.list_loras() if self.host_cache is not None else []

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """Return sampling parameters with the model's defaults, updated with `changes`."""
        return self.engine.default_sampling_params(**changes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a prompt; see `InputProcessor.encode`."""
        return self.input_processor.encode(text, add_special_tokens=add_special_tokens)

    def summary(self) -> EngineSummary:
        """Return what the engine has loaded."""
        return self.engine.summary()

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread is running."""
        return self._is_alive and self._thread.is_alive()

    @property
    def status(self) -> Literal["ready", "shutting down", "dead"]:
        """State of the engine, as health checks report it."""
        if self._is_stopping:
            return "shutting down"
        return "ready" if self.is_alive else "dead"

    async def run_in_pool(self, function: Callable[..., T], *args: Any, pool: PoolName = "input") -> T:
        """Run blocking work in a thread pool.

        Args:
            pool: `input` for work on text; `media` for media, so that text does not wait for them; `large_body`, with
                one thread, for parsing that stops all threads for a while; `loader` for work that may load adapters.

        Raises:
            EngineDeadError: the engine was shut down.
            EngineInUseError: after a fork, which has none of the threads.
        """
        self.engine.lock.check_process()
        try:
            future = asyncio.get_running_loop().run_in_executor(self._pools[pool], function, *args)
        except RuntimeError:  # the pool was shut down
            raise EngineDeadError("the engine has stopped and serves no further request") from None
        return await future

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | object | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, and yield its output as deltas.

        The final output has `finished=True`. Leaving the iteration early, or cancelling it, aborts the request.

        Args:
            prompt, sampling_params, lora_request, priority: as in `LLM.generate`.
            request_id: unique among unfinished requests; generated by default.

        Raises:
            RequestError: the request cannot be served.
            EngineDeadError: the engine has stopped.
        """
        ready = await self.prepare(prompt, sampling_params, request_id, lora_request, priority)
        async with aclosing(self.run(ready)) as outputs:
            async for output in outputs:
                yield output

    async def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | object | None = None,
        priority: int = 0,
        group: str | None = None,
    ) -> PreparedRequest:
        """Process a request for `run` without queueing it, so that several can be validated before any is started.

        Args:
            prompt, sampling_params, request_id, lora_request, priority: as in `generate`.
            group: name of requests that share the turns of one request, such as the prompts of one HTTP request.

        Raises:
            RequestError: the request cannot be served.
            EngineDeadError: the engine has stopped.
        """
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        record = RequestRecord(request_id, time.monotonic())
        records = OPEN_RECORDS.get()
        if records is not None:
            records.append(record)
        process = functools.partial(
            self.engine.process_input, request_id, prompt, sampling_params, lora_request, priority
        )
        media = media_of(prompt)
        pool: PoolName = "media" if media is not None else "input"
        self._preparing.append(record)
        try:
            must_load = self.engine.must_load_lora(lora_request)
            request_input = await self.run_in_pool(process, pool="loader" if must_load else pool)
        except asyncio.CancelledError:
            if isinstance(media, PromptMedia):
                media.cancel()
            raise
        finally:
            self._preparing.remove(record)
        request_input = replace(request_input, group=group)
        return PreparedRequest(request_input, RequestStream(record, self.histograms))

    async def run(self, prepared: PreparedRequest) -> AsyncGenerator[RequestOutput, None]:
        """Queue a request that `prepare` returned, and yield its outputs as `generate` does."""
        request_id, stream = prepared.input.request_id, prepared.stream
        stream.record.queue(prepared.input, time.monotonic())
        self._send(lambda: self._add(prepared))
        if stream.record.is_aborted:
            self._send(lambda: self._abort(request_id, stream), ignore_stopped=True)
        is_finished = False
        try:
            while not is_finished:
                output = await stream.get()
                is_finished = output.finished
                yield output
        except MMLoRAError:
            is_finished = True
            raise
        finally:
            if not is_finished:
                self._send(lambda: self._abort(request_id, stream), ignore_stopped=True)

    add_lora = _lora_method(LoRAManager.add)
    reload_lora = _lora_method(LoRAManager.reload)
    remove_lora = _lora_method(LoRAManager.remove)

    async def pin_lora(self, lora: str | int, *, is_pinned: bool = True) -> None:
        """Exempt an adapter from eviction, or undo that; see `LoRAMethods.pin_lora`.

        Raises:
            AdapterError: see `LoRAMethods.pin_lora`.
            EngineDeadError: the engine has stopped.
        """
        if is_pinned:
            await self.run_in_pool(self.engine.lora.pin, lora, self._run_in_engine, pool="loader")
        else:
            await self.change_loras(functools.partial(self.engine.lora.unpin, lora))

    async def change_loras(self, change: Callable[[], T]) -> T:
        """Change the host cache in a loader thread, then sync the slots in the engine thread between two steps.

        Args:
            change: uses `engine.lora`. It runs to completion even if the caller is cancelled.

        Raises:
            EngineDeadError: the engine has stopped.
        """

        def change_and_sync() -> T:
            result = change()
            self._run_in_engine(self.engine.sync_slots)
            return result

        return await self.run_in_pool(change_and_sync, pool="loader")

    async def list_loras(self) -> list[LoRAInfo]:
        """Return the state of every known adapter; see `LoRAMethods.list_loras`."""
        return self.engine.list_loras()

    def _run_in_engine(self, function: Callable[[], None]) -> None:
        """Run a short function in the engine thread between two steps, and wait for it; called by a loader thread.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        done: Future[None] = Future()

        def message() -> None:
            try:
                function()
            except BaseException as error:  # the waiting thread raises it
                done.set_exception(error)
            else:
                done.set_result(None)

        self._send(message)
        done.result()

    async def abort(self, request_id: str) -> None:
        """Abort a request; its iterator yields a final output with `finish_reason="abort"`."""
        for record in self._preparing:
            record.is_aborted |= record.request_id == request_id
        self._send(lambda: self._abort(request_id), ignore_stopped=True)

    def shutdown(self) -> None:
        """Abort all requests, and stop the engine thread and the pools; returns when they have stopped."""
        self._is_stopping = True
        self.media.workers.close()
        self._inbox.put(None)
        self._thread.join()
        for pool in self._pools.values():
            pool.shutdown()

    def _send(self, message: Callable[[], None], *, ignore_stopped: bool = False) -> None:
        """Queue a message, which the engine thread calls between two steps.

        Raises:
            EngineDeadError: the engine has stopped, and not `ignore_stopped`.
        """
        with self._lock:
            if self._is_alive:
                self._inbox.put(message)
            elif not ignore_stopped:
                raise EngineDeadError("the engine has stopped and serves no further request")

    def _serve(self) -> None:
        """Main loop of the engine thread: handle messages, step, deliver outputs; while idle, block on the inbox."""
        try:
            with self.engine.lock.session("AsyncLLM"):
                self._step_until_stopped()
        except BaseException as error:  # a panic in a Rust library is not an Exception
            logger.exception("the engine died")
            self._close(EngineDeadError(f"the engine died: {error}"))
        else:
            for request_id in list(self._streams):
                self._abort(request_id)
            self._close(EngineDeadError("the engine was shut down"))

    def _step_until_stopped(self) -> None:
        while self._take_messages():
            for output in self.engine.step(is_delta=True):
                self._deliver(output)

    def _take_messages(self) -> bool:
        """Handle queued messages, blocking while no request is unfinished; return False to shut down."""
        while True:
            try:
                message = self._inbox.get(block=not self.engine.has_unfinished_requests)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _add(self, prepared: PreparedRequest) -> None:
        try:
            if not self._is_alive:
                raise EngineDeadError("the engine stopped before the request began")
            self.engine.add_input(prepared.input)
        except MMLoRAError as error:
            prepared.stream.put(error)
        else:
            self._streams[prepared.input.request_id] = prepared.stream

    def _abort(self, request_id: str, stream: RequestStream | None = None) -> None:
        if stream is not None and self._streams.get(request_id) is not stream:
            return  # it is finished, or another request has its id now
        output = self.engine.abort_request(request_id, is_delta=True)
        if output is not None:
            self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if output.finished:
            self._streams.pop(output.request_id, None)
        if stream is not None:
            stream.put(output)

    def _close(self, error: EngineDeadError) -> None:
        with self._lock:
            self._is_alive = False
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        while not self._inbox.empty():  # each message reports to its request that the engine has stopped
            message = self._inbox.get()
            if message is not None:
                message()
