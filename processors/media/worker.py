"""The process that decodes media, started as `python -m mmlora.processors.media.worker` by `worker_pool.py`.

It imports neither torch nor transformers, reads only its channel, and ends when the server closes the channel.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Final

from mmlora.errors import MediaError
from mmlora.processors.media.channel import Channel
from mmlora.processors.media.items import MediaItem, MediaLimits
from mmlora.processors.modalities import MODALITIES
from mmlora.utils.base64_text import decode_base64

NICENESS: Final = 10  # decoding gives way to the engine
MAX_ERROR_CHARS: Final = 4096


def main() -> None:
    """Decode files one after another until the channel is closed."""
    options = json.loads(sys.argv[1])
    limits, timeout_s = MediaLimits(**options["limits"]), options["timeout_s"]
    channel_file = os.dup(0)  # not inheritable, and out of the way of libraries that print
    channel = Channel(socket.socket(fileno=channel_file))
    threading.Thread(target=_exit_with_server, args=(channel_file,), daemon=True).start()
    _prepare_process(options["memory_bytes"])
    channel.send({"is_ready": True})
    while True:
        try:
            job = channel.receive()
        except EOFError:
            return
        _limit_cpu_time(timeout_s)
        _answer(channel, job, limits)


def _answer(channel: Channel, job: dict[str, Any], limits: MediaLimits) -> None:
    """Decode one file and send the item, or the error."""
    content = bytes(channel.read(job["num_bytes"]))
    try:
        data = decode_base64(content.decode("ascii")) if job["is_base64"] else content
        item: MediaItem = MODALITIES[job["modality"]].decode(data, limits)
    except MediaError as error:
        channel.send({"error": str(error)[:MAX_ERROR_CHARS]})
    except MemoryError:
        channel.send({"is_out_of_memory": True})
    except Exception:
        channel.send({"failure": traceback.format_exc()[-MAX_ERROR_CHARS:]})
    else:
        channel.send({"content_hash": item.content_hash, **item.dimensions}, item.chunks())


def _prepare_process(memory_bytes: int) -> None:
    """Limit the process. Where a limit does not exist, as on macOS, the time limit of the server remains."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to whole groups; open requests may still be drained
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # libraries print warnings about damaged files
        os.dup2(null, standard)
    os.close(null)
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # if memory runs out, this process is killed and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _limit_cpu_time(timeout_s: float) -> None:
    """End this process if a file takes longer and the server does not end it, because it has been killed itself."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _exit_with_server(channel_file: int) -> None:
    """End the process when the server closes the channel or is killed, even while a file is decoded."""
    poll = select.poll()
    poll.register(channel_file, 0)  # only reports that the other end was closed
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
