"""`AsyncLLM`: deltas, aborts of abandoned requests, and errors instead of hangs when the engine dies."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from mmlora import AsyncLLM, EngineArgs, LoRARequest, RequestOutputKind, SamplingParams
from mmlora.errors import AdapterNotFound, EngineDeadError, MediaError, RequestError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TIMEOUT_S = 120


def start(model, **options) -> AsyncLLM:
    return AsyncLLM(EngineArgs(model=str(model), max_model_len=256, enable_lora=True, max_loras=1, **options))


@pytest.fixture(scope="module")
def llm(tiny_phi4):
    llm = start(tiny_phi4)
    yield llm
    llm.shutdown()


def run(coroutine):
    """Run in an event loop, with a timeout."""
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


async def collect(llm, prompt="hello", params=SHORT, **arguments):
    return [output async for output in llm.generate(prompt, params, **arguments)]


def tokens_of(outputs, index=0):
    return [token for output in outputs for token in output.outputs[index].token_ids]


async def until_idle(llm):
    while llm.engine.has_unfinished_requests or llm._streams:
        await asyncio.sleep(0.005)
    manager = llm.engine.block_manager
    assert manager.num_free_blocks == manager.num_blocks
    assert llm.engine.slots.num_users(0) == 0


def test_deltas_add_up_to_the_output_of_the_engine(llm):
    async def check():
        for params in (SHORT, SamplingParams(n=3, seed=5, max_tokens=20, logprobs=1, stop=["e", "th"])):
            outputs = await collect(llm, params=params)
            again = await collect(llm, params=params)
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            for index in range(params.n):
                text = "".join(output.outputs[index].text for output in outputs)
                tokens = tokens_of(outputs, index)
                assert tokens == tokens_of(again, index)
                assert outputs[-1].outputs[index].finish_reason in ("length", "stop")
                if outputs[-1].outputs[index].finish_reason == "length":
                    assert len(tokens) == params.max_tokens
                    assert text == llm.tokenizer.decode(tokens, skip_special_tokens=True)
                if params.logprobs is not None:
                    entries = [entry for output in outputs for entry in output.outputs[index].logprobs]
                    assert len(entries) == len(tokens) and all(t in e for t, e in zip(tokens, entries, strict=True))

    run(check())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_outputs_hold_what_their_kind_says(llm, kind):
    async def check():
        whole = tokens_of(await collect(llm))
        outputs = await collect(llm, params=replace(SHORT, output_kind=kind))
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if kind is RequestOutputKind.FINAL_ONLY:
            assert counts == [8]
        elif kind is RequestOutputKind.CUMULATIVE:
            assert counts[-1] == 8 and counts == sorted(counts)
        else:
            assert sum(counts) == 8
        assert (tokens_of(outputs) if sum(counts) == 8 else outputs[-1].outputs[0].token_ids) == whole
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    run(check())


def test_concurrent_requests_get_their_own_answers(llm, tiny_adapters):
    async def check():
        loras = [None] + [LoRARequest(name, 1 + i, str(tiny_adapters[name])) for i, name in enumerate("ab")]
        jobs = [(prompt, lora) for prompt in ("hello", "other words") for lora in loras]
        alone = [tokens_of(await collect(llm, prompt, lora_request=lora)) for prompt, lora in jobs]
        together = await asyncio.gather(*(collect(llm, prompt, lora_request=lora) for prompt, lora in jobs))
        assert [tokens_of(outputs) for outputs in together] == alone
        assert len({tuple(tokens) for tokens in alone}) == 6

    run(check())


def test_requests_run_by_priority(tiny_phi4):
    llm, ended = start(tiny_phi4, max_num_seqs=1, scheduling_policy="priority"), []

    async def ask(name, priority, params=SHORT):
        async for output in llm.generate(name, params, priority=priority):
            if output.finished:
                ended.append(name)

    async def check():
        first = asyncio.create_task(ask("first", 9, LONG))
        while not llm.engine.scheduler.running:
            await asyncio.sleep(0.005)
        await asyncio.gather(first, ask("late", 2), ask("early", 1))

    run_step = llm.engine.runner.run

    def run_slowly(scheduled):
        time.sleep(0.02 if len(llm.engine.scheduler.waiting) < 2 and not ended else 0)
        return run_step(scheduled)

    llm.engine.runner.run = run_slowly
    try:
        run(check())
    finally:
        llm.shutdown()
    assert ended == ["first", "early", "late"]


def test_abort_ends_the_iterator_with_one_terminal_output(llm):
    async def check():
        outputs = []
        async for output in llm.generate("hello", LONG, request_id="mine"):
            outputs.append(output)
            if len(outputs) == 3:
                await llm.abort("mine")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert sum(output.finished for output in outputs) == 1
        assert 3 <= len(tokens_of(outputs)) < 200
        await llm.abort("mine")  # finished: nothing to do
        await llm.abort("never seen")
        await until_idle(llm)

    run(check())


def test_a_request_can_be_aborted_while_it_is_being_processed(llm, monkeypatch):
    async def check():
        process_input = llm.engine.process_input

        def slow(*arguments):
            time.sleep(0.3)
            return process_input(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "process_input", slow)
            task = asyncio.ensure_future(collect(llm, params=LONG, request_id="early"))
            await asyncio.sleep(0.05)
            await llm.abort("early")
            outputs = await task
        assert outputs[-1].outputs[0].finish_reason == "abort" and len(tokens_of(outputs)) < 10
        assert not llm._preparing
        await until_idle(llm)

    run(check())


@pytest.fixture
def aborted(llm, monkeypatch):
    """Collect the finish reasons of aborted requests."""
    reasons = []
    abort = llm.engine.abort_request

    def spy(request_id, **arguments):
        output = abort(request_id, **arguments)
        if output is not None:  # None after a late abort, for example of the previous test
            reasons.extend(completion.finish_reason for completion in output.outputs)
        return output

    monkeypatch.setattr(llm.engine, "abort_request", spy)
    return reasons


def test_leaving_the_iterator_aborts(llm, aborted):
    async def check():
        async with aclosing(llm.generate("hello", LONG)) as outputs:
            async for _ in outputs:
                break
        await until_idle(llm)

    run(check())
    assert aborted == ["abort"]


def test_cancelling_the_task_aborts(llm, aborted):
    async def check():
        task = asyncio.create_task(collect(llm, params=LONG))
        while not llm.engine.has_unfinished_requests:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(llm)

    run(check())
    assert aborted == ["abort"]


def test_a_bad_request_fails_alone(llm):
    bad = [
        ({"prompt": ""}, RequestError, "empty"),
        ({"prompt": {"prompt": "x", "multi_modal_data": {"image": b""}}}, MediaError, "0 bytes"),
        ({"lora_request": LoRARequest("gone", 9, "/no/such/adapter")}, AdapterNotFound, "/no/such/adapter"),
        ({"params": SamplingParams(logprobs=10_000)}, RequestError, "max_logprobs"),
    ]

    async def check():
        good = tokens_of(await collect(llm))
        for arguments, error, message in bad:
            concurrent = asyncio.create_task(collect(llm))
            with pytest.raises(error, match=message):
                await collect(llm, **arguments)
            assert tokens_of(await concurrent) == good
        assert llm.is_alive
        await until_idle(llm)

    run(check())


def test_an_id_in_use_is_refused_and_its_owner_continues(llm):
    async def check():
        owner = asyncio.create_task(collect(llm, params=LONG, request_id="same"))
        while not llm.engine.has_unfinished_requests:
            await asyncio.sleep(0.005)
        with pytest.raises(RequestError, match="'same' is in use"):
            await collect(llm, request_id="same")
        assert len(tokens_of(await owner)) == 200
        assert len(tokens_of(await collect(llm, request_id="same"))) == 8

    run(check())


def test_a_failed_step_fails_only_its_requests(llm, monkeypatch):
    async def check():
        def fail(_):
            raise RuntimeError("device lost")

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "run", fail)
            (output,) = await collect(llm)
        assert output.finished and output.outputs[0].finish_reason == "error"
        assert "device lost" in str(output.error)
        assert len(tokens_of(await collect(llm))) == 8
        await until_idle(llm)

    run(check())


def test_shutdown_finishes_every_request_and_refuses_new_ones(tiny_phi4):
    async def check():
        llm = start(tiny_phi4)
        tasks = [asyncio.create_task(collect(llm, params=LONG)) for _ in range(3)]
        while not llm.engine.has_unfinished_requests:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(llm.shutdown)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, EngineDeadError):  # shut down before it was queued
                assert result[-1].finished and result[-1].outputs[0].finish_reason == "abort"
        assert not llm.is_alive
        with pytest.raises(EngineDeadError, match="stopped"):
            await collect(llm)
        llm.shutdown()

    run(check())


class Panic(BaseException):
    """Like the panic of a Rust library, which is not an Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_a_dead_engine_fails_every_request_and_never_hangs(tiny_phi4, monkeypatch, kind):
    async def check():
        llm = start(tiny_phi4)
        schedule, first_s = llm.engine.scheduler.schedule, time.monotonic()

        def die():
            if time.monotonic() - first_s > 0.3:
                raise kind("bug in the scheduler")
            return schedule()

        monkeypatch.setattr(llm.engine.scheduler, "schedule", die)
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        tasks = [asyncio.create_task(collect(llm, "x" * n, params)) for n in range(1, 5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await collect_until_dead(llm)
        assert all(isinstance(r, EngineDeadError) or r[-1].finished for r in results)
        assert any(isinstance(r, EngineDeadError) and "bug in the scheduler" in str(r) for r in results)
        assert not llm.is_alive
        with pytest.raises(EngineDeadError):
            await collect(llm)
        llm.shutdown()

    run(check())


async def collect_until_dead(llm):
    while llm.is_alive:
        await asyncio.sleep(0.01)
