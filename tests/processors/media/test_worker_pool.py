"""Decoding in worker processes: equal results, limits of time and memory, cancellation, crashes, and no orphans."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlora.errors import EngineDeadError, MediaError, MMLoRAError
from mmlora.processors.media import worker_pool
from mmlora.processors.media.channel import Channel
from mmlora.processors.media.items import DEFAULT_LIMITS, MediaLimits
from mmlora.processors.media.loader import MediaLoader, MediaReference, PromptMedia, load_media, sniff_modality
from mmlora.processors.media.worker_pool import WorkerPool
from tests.processors.media.files import encode

TIMEOUT_S = 30.0
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shared_pool():
    pool = WorkerPool(DEFAULT_LIMITS, num_workers=2, timeout_s=TIMEOUT_S)
    yield pool
    pool.close()


@pytest.fixture
def pool():
    """A pool of one started worker."""
    pool = WorkerPool(DEFAULT_LIMITS, num_workers=1, timeout_s=TIMEOUT_S)
    pool.start()
    yield pool
    pool.close()


@pytest.fixture
def png(picture, encode_image):
    return encode_image(picture())


@pytest.fixture(scope="module")
def large_png(tmp_path_factory):
    """A picture that takes a second or more."""
    path = tmp_path_factory.mktemp("large") / "a.png"
    Image.new("RGB", (8000, 8000)).save(path)
    return path


def decode(pool, data, budget=None):
    return pool.decode(sniff_modality(data), data, budget or pool.new_budget())


def process_of(pool):
    return pool._workers[0]._process


def stop_process(pool):
    """Stop the worker of a pool, as if it decoded forever."""
    decode(pool, encode("mp3"))
    os.kill(process_of(pool).pid, signal.SIGSTOP)


def in_thread(function, *arguments):
    results = []

    def run():
        try:
            results.append(function(*arguments))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def wait_for(condition, timeout_s=30.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("format", "modes"),
    [
        ("PNG", ["RGB", "L", "P", "1", "LA", "RGBA", "I;16"]),
        ("JPEG", ["RGB", "L", "CMYK"]),
        ("WEBP", ["RGB", "RGBA"]),
        ("GIF", ["RGB", "P", "RGBA"]),
        ("BMP", ["RGB", "L", "P", "1", "RGBA"]),
    ],
)
def test_images_equal_those_of_this_process(shared_pool, picture, encode_image, format, modes):
    for mode in modes:
        image = picture(201, 103)
        gray = np.asarray(image)[..., 0].astype(np.uint16)
        data = encode_image(Image.fromarray(257 * gray) if mode == "I;16" else image.convert(mode), format)
        there, here = decode(shared_pool, data), load_media(data)
        assert there.content_hash == here.content_hash
        assert there.image.mode == "RGB" and there.image.tobytes() == here.image.tobytes()


def test_an_image_of_several_strips_equals_that_of_this_process(shared_pool, picture, encode_image):
    data = encode_image(picture(2001, 1203), "BMP")
    there, here = decode(shared_pool, data), load_media(data)
    assert there.content_hash == here.content_hash and there.image.tobytes() == here.image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_that_of_this_process(shared_pool, picture, encode_image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(picture(61, 40), "JPEG", exif=exif)
    assert decode(shared_pool, data).image.tobytes() == load_media(data).image.tobytes()


@pytest.mark.parametrize("name", ["m4a", "webm", "mkv", "adts", "mp3"])
def test_ffmpeg_formats_equal_those_of_this_process(shared_pool, name):
    there, here = decode(shared_pool, encode(name)), load_media(encode(name))
    assert (there.content_hash, there.sample_rate) == (here.content_hash, here.sample_rate)
    assert np.array_equal(there.samples, here.samples) and not there.samples.flags.writeable


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("rate", [8000, 44100])
def test_soundfile_formats_equal_those_of_this_process(shared_pool, encode_audio, tone, format, channels, rate):
    samples = np.stack([tone(9000, rate, 200.0 + channel) for channel in range(channels)], axis=1)
    data = encode_audio(samples, rate, format)
    there, here = decode(shared_pool, data), load_media(data)
    assert there.content_hash == here.content_hash and np.array_equal(there.samples, here.samples)


def test_a_refused_file_costs_no_process(pool, png):
    decode(pool, png)
    pid = process_of(pool).pid
    for data in (png[:-30], png[:30]):
        with pytest.raises(MediaError, match="cannot decode") as here:
            load_media(data)
        with pytest.raises(MediaError) as there:
            decode(pool, data)
        assert str(there.value) == str(here.value)
    assert decode(pool, png).image.size == (60, 40) and process_of(pool).pid == pid


def test_the_time_limit_kills_the_worker_and_spares_the_next_request(png):
    pool = WorkerPool(DEFAULT_LIMITS, num_workers=1, timeout_s=0.3)
    stop_process(pool)
    process, start_s = process_of(pool), time.monotonic()
    with pytest.raises(MediaError, match="media of the prompt takes more than the allowed 0.3 s"):
        decode(pool, png)
    assert time.monotonic() - start_s < 10 and process.returncode == -signal.SIGKILL
    assert pool.num_lost == {"timeout": 1, "cancelled": 0, "crashed": 0} and 0.3 <= pool.decode_s < 10
    assert process_of(pool).pid != process.pid  # started before the next request needs it
    assert decode(pool, png).image.size == (60, 40)
    pool.close()


def test_the_media_of_a_prompt_share_the_time_limit(pool, png):
    budget = pool.new_budget()
    decode(pool, png, budget)
    assert 0 < budget.rest_s < TIMEOUT_S
    budget.rest_s = 0.0
    with pytest.raises(MediaError, match="more than the allowed 30 s"):
        decode(pool, png, budget)


@pytest.mark.parametrize("is_large", [False, True])  # the file fits into the buffers of the channel, or not
def test_cancelling_ends_the_decoding_at_once(pool, png, is_large):
    stop_process(pool)
    process, budget = process_of(pool), pool.new_budget()
    thread, results = in_thread(decode, pool, png + bytes(20_000_000 if is_large else 0), budget)
    wait_for(lambda: budget.worker is not None)
    start_s = time.monotonic()
    pool.cancel(budget)
    thread.join(20)
    assert not thread.is_alive() and time.monotonic() - start_s < 10
    assert isinstance(results[0], MediaError) and "cancelled" in str(results[0])
    assert process.returncode == -signal.SIGKILL and pool.num_lost["cancelled"] == 1
    with pytest.raises(MediaError, match="cancelled"):
        decode(pool, png, budget)
    assert decode(pool, png).image.size == (60, 40)


def test_cancelling_ends_the_wait_for_a_worker(pool, png):
    stop_process(pool)
    running, waiting = pool.new_budget(), pool.new_budget()
    threads = [in_thread(decode, pool, png, running)]
    wait_for(lambda: running.worker is not None)
    threads.append(in_thread(decode, pool, png, waiting))
    pool.cancel(waiting)
    threads[1][0].join(20)
    assert "cancelled" in str(threads[1][1][0]) and threads[0][0].is_alive()
    pool.cancel(running)
    threads[0][0].join(20)
    assert not threads[0][0].is_alive()


def test_cancelling_a_prompt_reaches_its_worker(png):
    loader = MediaLoader()
    media = PromptMedia(loader, [MediaReference("image", png, "object")] * 2)
    stop_process(loader.workers)
    thread, results = in_thread(media.load)
    wait_for(lambda: loader.workers._open)
    media.cancel()
    thread.join(20)
    assert "cancelled" in str(results[0])
    loader.workers.close()


def test_a_crash_fails_one_file_only(pool, png):
    stop_process(pool)
    process, budget = process_of(pool), pool.new_budget()
    thread, results = in_thread(decode, pool, png, budget)
    wait_for(lambda: budget.worker is not None)
    process.send_signal(signal.SIGSEGV)
    process.send_signal(signal.SIGCONT)
    thread.join(20)
    assert isinstance(results[0], MediaError) and "crashed on this image" in str(results[0])
    assert pool.num_lost["crashed"] == 1
    assert decode(pool, png).image.size == (60, 40)


def test_a_worker_that_died_while_idle_is_replaced(pool, png):
    decode(pool, png)
    process_of(pool).kill()
    process_of(pool).wait()
    assert decode(pool, png).image.size == (60, 40)


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch, png):
    def fail():
        raise OSError(24, "Too many open files")

    pool = WorkerPool(DEFAULT_LIMITS, num_workers=1, timeout_s=TIMEOUT_S)
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool.socket, "socketpair", fail)
        for _ in range(2):
            thread, results = in_thread(decode, pool, png)
            thread.join(TIMEOUT_S)
            assert type(results[0]) is MMLoRAError  # not a fault of the client
            assert "cannot be started: [Errno 24] Too many open files" in str(results[0])
    assert decode(pool, png).modality == "image"
    pool.close()


def test_a_late_cancellation_spares_the_process_of_the_next_request(pool, png):
    budget = pool.new_budget()
    start = pool._workers[0].start

    def start_late():
        start()
        pool.cancel(budget)  # as by another thread while this one frees the worker

    decode(pool, png, budget)
    pool._workers[0].start = start_late
    pool._free_worker(pool._take_worker(budget := pool.new_budget()), budget, 0.0)
    pool._workers[0].start = start
    assert decode(pool, png).modality == "image"
    assert not pool.num_lost["crashed"]


def test_the_memory_limit_is_named(monkeypatch, large_png, png):
    monkeypatch.setattr(worker_pool, "BASE_BYTES", 2**28)
    monkeypatch.setattr(worker_pool, "BYTES_PER_PIXEL", 1)
    pool = WorkerPool(MediaLimits(max_bytes=2**20, max_samples=1), num_workers=1, timeout_s=TIMEOUT_S)
    with pytest.raises(MediaError, match="memory than the allowed 319.0 MiB"):
        decode(pool, large_png.read_bytes())
    assert decode(pool, png).image.size == (60, 40)
    pool.close()


def test_the_limits_of_the_pool_hold_in_its_workers(png):
    pool = WorkerPool(MediaLimits(max_pixels=2399), num_workers=1, timeout_s=TIMEOUT_S)
    with pytest.raises(MediaError, match="60x40 px is larger than the allowed 2399 px"):
        decode(pool, png)
    pool.close()


def test_closing_ends_running_and_waiting_requests_and_all_processes(pool, png):
    stop_process(pool)
    process = process_of(pool)
    budgets = [pool.new_budget() for _ in range(3)]
    threads = [in_thread(decode, pool, png, budget) for budget in budgets]
    wait_for(lambda: pool._open)
    pool.close()
    for thread, results in threads:
        thread.join(20)
        assert isinstance(results[0], EngineDeadError)
    assert process.returncode is not None and process_of(pool) is None
    with pytest.raises(EngineDeadError):
        decode(pool, png)


def test_processes_end_with_a_pool_that_is_not_closed(png):
    pool = WorkerPool(DEFAULT_LIMITS, num_workers=1, timeout_s=TIMEOUT_S)
    decode(pool, png)
    process = process_of(pool)
    del pool
    assert process.returncode is not None


def test_many_threads_share_the_workers(shared_pool, picture, encode_image):
    files = [encode_image(picture(40 + n, 30)) for n in range(24)]
    threads = [in_thread(decode, shared_pool, data) for data in files]
    for thread, _ in threads:
        thread.join(60)
    assert [results[0].image.width for _, results in threads] == [40 + n for n in range(24)]


def test_output_of_libraries_goes_nowhere(pool, png):
    decode(pool, png)
    folder = Path(f"/proc/{process_of(pool).pid}/fd")
    assert [os.readlink(folder / name) for name in ("0", "1", "2")] == ["/dev/null"] * 3


def test_a_worker_survives_the_signals_of_its_group(pool, png):
    decode(pool, png)
    for number in (signal.SIGINT, signal.SIGTERM):
        process_of(pool).send_signal(number)
    pid = process_of(pool).pid
    assert decode(pool, png).image.size == (60, 40) and process_of(pool).pid == pid


def run_python(code, *arguments, cwd=ROOT, **environment):
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_worker_imports_neither_torch_nor_transformers():
    code = (
        "import sys, mmlora.processors.media.worker\n"
        "names = 'torch transformers librosa scipy av soundfile fastapi pydantic httpx'.split()\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    assert run_python(code).strip() == "[]"


IN_FOLDER = """
import os, shutil, sys
from mmlora.processors.media.loader import MediaLoader
folder = sys.argv[1]
os.chdir(folder)
sys.path[:0] = ["", folder]
if sys.argv[2] == "deleted":
    shutil.rmtree(folder)
print(MediaLoader().load(bytes.fromhex(sys.argv[3])).image.size)
"""


@pytest.mark.parametrize("state", ["kept", "deleted"])
def test_the_worker_needs_and_imports_nothing_of_the_current_directory(tmp_path, png, state):
    for name in ("numpy", "PIL", "json", "av"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    printed = run_python(IN_FOLDER, str(tmp_path), state, png.hex())
    assert printed.strip() == "(60, 40)"


BUSY_WORKER = """
import types
from mmlora.processors.media import worker

def decode(*_):
    while True:
        pass

worker.MODALITIES = {"image": types.SimpleNamespace(decode=decode)}
worker.main()
"""


def test_a_busy_worker_ends_when_its_server_is_killed():
    """The end of the server closes its end of the channel."""
    ours, theirs = socket.socketpair()
    options = {"limits": asdict(DEFAULT_LIMITS), "timeout_s": 600, "memory_bytes": 2**31}
    command = [sys.executable, "-c", BUSY_WORKER, json.dumps(options)]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), cwd=ROOT)
    channel = Channel(ours)
    try:
        assert channel.receive() == {"is_ready": True}
        channel.send({"modality": "image", "num_bytes": 1, "is_base64": False}, [b"x"])
        time.sleep(0.2)
        assert process.poll() is None
        channel.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_busy_process_ends_after_the_time_limit_although_nobody_watches():
    code = "from mmlora.processors.media.worker import _limit_cpu_time\n_limit_cpu_time(0.1)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGXCPU
