"""One engine used from several threads, from inside its own calls, and after a fork."""

import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mmlora import BASE, LLM, AsyncLLM, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from mmlora.errors import EngineInUseError
from mmlora.utils.locks import EngineLock, FairLock

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TIMEOUT_S = 60
AUDIO = (np.sin(np.arange(8000) / 20).astype(np.float32), 16000)
IMAGE = Image.new("RGB", (42, 42), "red")


@pytest.fixture(scope="module")
def llm(tiny_phi4):
    return LLM(str(tiny_phi4), enable_lora=True, max_loras=2, max_cpu_loras=4, max_model_len=256)


@pytest.fixture(scope="module")
def loras(tiny_adapters):
    return [BASE, *(LoRARequest(name, 1 + index, str(tiny_adapters[name])) for index, name in enumerate("ab"))]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(12) as pool:
        yield pool


def make_jobs(loras):
    """Calls of `generate` that differ in prompt, adapter, number of outputs and sampling."""
    jobs = []
    for index in range(18):
        params = SamplingParams(
            n=1 + index % 3, temperature=index % 2, seed=index, max_tokens=4 + index % 7, ignore_eos=True
        )
        prompts: list[object] = ["hello"[: 1 + index % 5], "other words"][: 1 + index % 2]
        if index % 6 == 5:
            prompts.append({"prompt": "<|audio|>x", "multi_modal_data": {"audio": AUDIO}})
        if index % 6 == 4:
            prompts.append({"prompt": "<|image|>x", "multi_modal_data": {"image": IMAGE}})
        jobs.append((prompts, params, loras[index % len(loras)]))
    return jobs


def ask(llm, job):
    prompts, params, lora = job
    outputs = llm.generate(prompts, params, lora, use_tqdm=False)
    return [(output.lora.adapter, [c.token_ids for c in output.outputs]) for output in outputs]


def is_free(engine):
    manager = engine.block_manager
    return not engine.has_unfinished_requests and manager.num_free_blocks == manager.num_blocks


def test_threads_that_share_an_llm_get_the_answers_of_one_thread(llm, loras, pool):
    jobs = make_jobs(loras)
    alone = [ask(llm, job) for job in jobs]
    for _ in range(3):
        assert list(pool.map(lambda job: ask(llm, job), jobs, timeout=TIMEOUT_S)) == alone
    assert is_free(llm.llm_engine)


def test_adapters_change_while_another_thread_generates(llm, loras, tiny_adapters, pool):
    jobs = make_jobs(loras)
    alone, is_done = [ask(llm, job) for job in jobs], threading.Event()

    def churn():
        count = 0
        while not is_done.is_set() or count < 5:
            lora = llm.add_lora(f"churn-{count % 2}", str(tiny_adapters["ab"[count % 2]]))
            llm.pin_lora(lora.lora_name)
            llm.reload_lora(lora.lora_name)
            llm.remove_lora(lora.lora_name)
            count += 1
        return count

    churning = pool.submit(churn)
    try:
        assert list(pool.map(lambda job: ask(llm, job), jobs * 3, timeout=TIMEOUT_S)) == alone * 3
    finally:
        is_done.set()
    assert churning.result(TIMEOUT_S) >= 5
    assert {info.name for info in llm.list_loras()} == {"a", "b"}


def test_a_change_of_an_adapter_waits_for_one_step_not_for_the_whole_call(llm, tiny_adapters, pool, monkeypatch):
    run, is_running = llm.llm_engine.runner.run, threading.Event()

    def run_slowly(model_input):
        is_running.set()
        time.sleep(0.02)
        return run(model_input)

    monkeypatch.setattr(llm.llm_engine.runner, "run", run_slowly)
    generating = pool.submit(ask, llm, ("hello", SamplingParams(max_tokens=200, ignore_eos=True), BASE))
    assert is_running.wait(TIMEOUT_S)
    llm.add_lora("during", str(tiny_adapters["a"]))
    llm.remove_lora("during")
    assert not generating.done()
    monkeypatch.undo()
    generating.result(TIMEOUT_S)


def test_threads_that_share_an_engine_lose_no_output(tiny_phi4, pool):
    engine = LLMEngine(EngineArgs(str(tiny_phi4), max_model_len=256, max_num_seqs=4))

    def finish(outputs):
        return {o.request_id: o.outputs[0].token_ids for o in outputs if o.finished and o.outputs[0].finish_reason}

    def run(worker):
        """Add requests, abort every third, and step, as all other threads do."""
        found, ids = {}, [f"{worker}-{index}" for index in range(9)]
        for index, request_id in enumerate(ids):
            engine.add_request(request_id, "hello" * (1 + index % 4), GREEDY)
            found |= finish(engine.step())
            if index % 3 == 2:
                aborted = engine.abort_request(request_id)
                found |= finish([aborted] if aborted is not None else [])
        while engine.has_unfinished_requests:
            found |= finish(engine.step())
        return found

    found = list(pool.map(run, range(8), timeout=TIMEOUT_S))
    names = [name for part in found for name in part]
    assert sorted(names) == sorted(f"{worker}-{index}" for worker in range(8) for index in range(9))
    alone = {}
    for index in range(4):
        engine.add_request("alone", "hello" * (1 + index), GREEDY)
        while engine.has_unfinished_requests:
            alone[index] = finish(engine.step()).get("alone")
    for name, tokens in ((name, tokens) for part in found for name, tokens in part.items()):
        index = int(name.split("-")[1])
        assert tokens == alone[index % 4][: len(tokens)] and (index % 3 == 2 or len(tokens) == 8)
    assert is_free(engine)


def test_a_step_from_another_thread_waits_for_the_end_of_generate(llm, pool, monkeypatch):
    run, stepping = llm.llm_engine.runner.run, []

    def run_and_step(model_input):
        if not stepping:
            stepping.append(pool.submit(llm.llm_engine.step))
        return run(model_input)

    alone = ask(llm, ("hello", GREEDY, BASE))
    monkeypatch.setattr(llm.llm_engine.runner, "run", run_and_step)
    assert ask(llm, ("hello", GREEDY, BASE)) == alone
    assert stepping[0].result(TIMEOUT_S) == [], "it took no output of the other call"


@pytest.mark.parametrize("place", ["model", "progress bar"])
def test_a_call_from_inside_a_call_is_refused(llm, monkeypatch, place):
    errors = []

    def call_again(*_):
        for call in (lambda: llm.generate("x", GREEDY, use_tqdm=False), lambda: llm.chat([{"role": "user"}])):
            try:
                call()
            except Exception as error:
                errors.append(error)

    alone = ask(llm, ("hello", GREEDY, BASE))
    if place == "model":
        run = llm.llm_engine.runner.run
        monkeypatch.setattr(llm.llm_engine.runner, "run", lambda model_input: (call_again(), run(model_input))[1])
    else:
        from mmlora import llm as module

        class Progress(module.tqdm):
            def update(self, n=1):
                call_again()

        monkeypatch.setattr(module, "tqdm", Progress)
    assert ask(llm, ("hello", GREEDY, BASE)) == alone
    assert isinstance(errors[0], EngineInUseError) and "from inside a call" in str(errors[0])
    monkeypatch.undo()
    assert ask(llm, ("hello", GREEDY, BASE)) == alone


def test_engine_calls_from_inside_a_step_are_refused(llm, monkeypatch, tiny_adapters):
    engine, run, errors = llm.llm_engine, llm.llm_engine.runner.run, []
    calls = (engine.step, lambda: engine.abort_request("r"), lambda: engine.add_request("s", "x", GREEDY))

    def run_and_call(model_input):
        for call in calls:
            with pytest.raises(EngineInUseError, match="from inside a call") as caught:
                call()
            errors.append(caught.value)
        llm.add_lora("inside", str(tiny_adapters["a"]))  # synced by the step
        llm.remove_lora("inside")
        return run(model_input)

    monkeypatch.setattr(engine.runner, "run", run_and_call)
    engine.add_request("r", "x", SamplingParams(max_tokens=2, ignore_eos=True))
    outputs = [engine.step() for _ in range(2)][-1]
    assert outputs[0].finished and outputs[0].error is None and len(errors) == 6


def test_generate_is_refused_while_other_requests_are_unfinished(llm):
    engine = llm.llm_engine
    engine.add_request("mine", "x", GREEDY)
    with pytest.raises(EngineInUseError, match="add_request are unfinished"):
        llm.generate("x", GREEDY, use_tqdm=False)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert outputs[-1].request_id == "mine" and outputs[-1].finished
    assert len(ask(llm, ("x", GREEDY, BASE))[0][1][0]) == 8


def test_the_engine_of_async_llm_refuses_other_threads(tiny_phi4):
    llm = AsyncLLM(EngineArgs(str(tiny_phi4), max_model_len=64))
    engine = llm.engine
    try:
        for call in (engine.step, lambda: engine.abort_request("r"), lambda: engine.add_request("r", "x", GREEDY)):
            with pytest.raises(EngineInUseError, match="the engine belongs to AsyncLLM"):
                call()
    finally:
        llm.shutdown()
    llm.shutdown()
    assert engine.step() == []


def in_fork(function):
    """Call a function in a forked process; return what it returned, or its exception, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = repr(function())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + TIMEOUT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def test_a_forked_process_is_refused(llm, loras):
    text = "EngineInUseError: the engine was created before a fork"
    engine = llm.llm_engine
    with engine.lock.session():  # as another thread may hold it at the time of the fork
        assert in_fork(lambda: llm.generate("x", GREEDY, use_tqdm=False)).startswith(text)
        assert in_fork(lambda: llm.generate(["x"] * 2, GREEDY, loras[:2], use_tqdm=False)).startswith(text)
        assert in_fork(lambda: llm.chat([{"role": "user", "content": "x"}])).startswith(text)
        assert in_fork(engine.step).startswith(text)
        assert in_fork(lambda: llm.remove_lora("a")).startswith(text)


def test_a_forked_process_of_async_llm_is_refused(tiny_phi4):
    import asyncio

    llm = AsyncLLM(EngineArgs(str(tiny_phi4), max_model_len=64))

    async def generate():
        return [output async for output in llm.generate("x", GREEDY)]

    try:
        assert in_fork(lambda: asyncio.run(generate())).startswith("EngineInUseError: the engine was created before")
        assert len(asyncio.run(generate())) == 8
    finally:
        llm.shutdown()


def test_an_interrupt_in_the_lock_leaves_the_llm_usable(llm, monkeypatch):
    """A signal may arrive after the lock of a call was taken and before the call began."""
    alone = ask(llm, ("hello", GREEDY, BASE))
    enter, calls = FairLock.__enter__, []

    def interrupted(self):
        enter(self)
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(FairLock, "__enter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("hello", GREEDY, BASE, use_tqdm=False)
    monkeypatch.undo()
    assert is_free(llm.llm_engine) and ask(llm, ("hello", GREEDY, BASE)) == alone


def test_a_fair_lock_is_taken_in_the_order_of_asking(pool):
    lock, order, threads = FairLock(), [], []
    with lock:
        for number in range(6):
            threads.append(pool.submit(lambda number=number: (lock.__enter__(), order.append(number), lock.__exit__())))
            while len(lock._queue) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.result(TIMEOUT_S)
    assert order == list(range(6))


def test_asking_for_the_holder_of_a_lock_survives_its_release():
    class Left(deque):
        """A queue that the last thread leaves while another one looks at it."""

        def __len__(self):
            length = super().__len__()
            self.clear()
            return length

    lock = FairLock()
    assert not lock.is_mine
    lock._queue = Left([threading.get_ident() + 1])
    assert not lock.is_mine


def test_a_loop_of_calls_does_not_starve_a_pause(pool):
    lock, is_paused = EngineLock(), threading.Event()

    def loop():
        count = 0
        with lock.session():
            while not is_paused.is_set():
                with lock.call():
                    count += 1
        return count

    looping = pool.submit(loop)
    for _ in range(100):
        with lock.pause():
            pass
    is_paused.set()
    assert looping.result(TIMEOUT_S) > 0
