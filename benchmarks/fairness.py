"""Measure scheduling fairness: 64 adapters share 4 slots with base traffic; print waits and latencies.

Arrivals are Poisson-distributed over scheduler steps and adapters are Zipf-distributed, so counts of steps are the same
on every machine and only times differ. Base requests are served with the adapter traffic and then alone.

    .venv/bin/python benchmarks/fairness.py

With `--completions 128`, measure a short request instead that arrives after one with so many completions.
"""

import argparse
import random
import time
from dataclasses import dataclass, field

from mmlora import BASE, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from mmlora.assets.models import assistant_adapters, assistant_path
from mmlora.engine.scheduler import ScheduledSequence

PROMPT = "<|user|>What is your name?<|end|><|assistant|>"


@dataclass
class Job:
    """A request. `adapter` is a number, None for the base model; each time is a pair of step and seconds."""

    arrival_step: int
    adapter: int | None
    num_tokens: int
    arrived: tuple[int, float] = (0, 0.0)
    started: tuple[int, float] | None = None
    ended: tuple[int, float] = (0, 0.0)

    @property
    def wait(self) -> tuple[int, float]:
        """Steps and seconds from arrival to the first step."""
        assert self.started is not None
        return self.started[0] - self.arrived[0], self.started[1] - self.arrived[1]

    @property
    def latency(self) -> tuple[int, float]:
        """Steps and seconds from arrival to the end."""
        return self.ended[0] - self.arrived[0] + 1, self.ended[1] - self.arrived[1]


@dataclass
class Run:
    """An engine that serves jobs, with counts of steps and seconds."""

    engine: LLMEngine
    jobs: list[Job]
    num_steps: int = 0
    num_s: float = 0.0
    ran: list[ScheduledSequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        schedule = self.engine.scheduler.schedule

        def recorded() -> list[ScheduledSequence]:
            self.ran = schedule()
            return self.ran

        self.engine.scheduler.schedule = recorded  # type: ignore[method-assign]

    def serve_all(self) -> None:
        """Add each job when its step comes, and serve all of them."""
        num_arrived, start_s = 0, time.monotonic()
        while num_arrived < len(self.jobs) or self.engine.has_unfinished_requests:
            while num_arrived < len(self.jobs) and self.jobs[num_arrived].arrival_step <= self.num_steps:
                self._add(num_arrived)
                num_arrived += 1
            now = self.num_steps, time.monotonic()
            outputs = self.engine.step()
            for item in self.ran:
                job = self.jobs[int(item.seq.request.request_id)]
                job.started = job.started or now
            for output in outputs:
                assert output.error is None, output.error
                if output.finished:
                    self.jobs[int(output.request_id)].ended = self.num_steps, time.monotonic()
            self.num_steps += 1
        self.num_s = time.monotonic() - start_s

    def _add(self, index: int) -> None:
        job = self.jobs[index]
        params = SamplingParams(max_tokens=job.num_tokens, temperature=0.0, ignore_eos=True)
        job.arrived = self.num_steps, time.monotonic()
        self.engine.add_request(str(index), PROMPT, params, lora_request(job.adapter))


def lora_request(adapter: int | None) -> object:
    """Return the request of an adapter. All have the same weights, but different names and identities."""
    if adapter is None:
        return BASE
    return LoRARequest(f"adapter-{adapter}", adapter + 1, assistant_adapters()["spanish-lora"])


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Return random traffic, sorted by arrival."""
    rng = random.Random(options.seed)
    zipf = [1 / rank for rank in range(1, options.adapters + 1)]
    tuned, base = (list(range(options.adapters)), zipf), ([None], [1.0])
    jobs = []
    for rate, (adapters, weights) in ((options.adapter_rate, tuned), (options.base_rate, base)):
        arrival = rng.expovariate(rate)
        while arrival < options.steps:
            jobs.append(Job(int(arrival), rng.choices(adapters, weights)[0], rng.randint(1, options.max_tokens)))
            arrival += rng.expovariate(rate)
    return sorted(jobs, key=lambda job: job.arrival_step)


def serve(options: argparse.Namespace, jobs: list[Job]) -> Run:
    """Serve jobs with an engine that has all adapters in its host cache."""
    limits = {"max_cpu_loras": options.adapters, "max_num_seqs": options.max_num_seqs}
    engine = LLMEngine(EngineArgs(assistant_path(), enable_lora=True, max_loras=options.slots, **limits))
    for adapter in range(options.adapters):
        engine.process_input(f"load {adapter}", PROMPT, None, lora_request(adapter))
    run = Run(engine, jobs)
    run.serve_all()
    return run


def measure_short_request(adapter: int | None, num_completions: int) -> None:
    """Print how long a request of 8 tokens takes that arrives 10 steps after one with many completions of 200."""
    engine = LLMEngine(EngineArgs(assistant_path(), enable_lora=True))
    engine.process_input("load", PROMPT, None, lora_request(adapter))
    if num_completions:
        many = SamplingParams(n=num_completions, seed=0, max_tokens=200, ignore_eos=True)
        engine.add_request("many", PROMPT, many, BASE)
    for _ in range(10):
        engine.step()
    start_s = time.monotonic()
    short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.add_request("short", PROMPT, short, lora_request(adapter))
    seen: list[tuple[int, float]] = []
    num_steps = 0
    while engine.has_unfinished_requests:
        outputs = engine.step()
        num_steps += 1
        if any(output.request_id == "short" for output in outputs):
            seen.append((num_steps, time.monotonic() - start_s))
    (first, first_s), (last, last_s) = seen[0], seen[-1]
    kind = "base" if adapter is None else "adapter"
    print(
        f"{kind} request after n={num_completions}: first token after {first} steps "
        f"{first_s:.2f} s, end after {last} steps {last_s:.2f} s; all work {time.monotonic() - start_s:.1f} s"
    )


def describe(what: str, values: list[tuple[int, float]]) -> str:
    """Return mean, p99 and maximum, in steps and ms, as a line."""
    steps, times = (sorted(column) for column in zip(*values, strict=True))
    mean_steps, mean_s, last = sum(steps) / len(steps), sum(times) / len(times), int(0.99 * len(steps))
    return (
        f"{what:<28}{len(steps):>5} requests: mean {mean_steps:6.1f} steps {1000 * mean_s:7.0f} ms, "
        f"p99 {steps[last]:4} steps {1000 * times[last]:7.0f} ms, max {steps[-1]:4} steps "
        f"({steps[-1] / max(mean_steps, 1e-9):.1f} x mean)"
    )


def main() -> None:
    """Serve the traffic with and without adapters, and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("adapters", 64), ("slots", 4), ("steps", 400), ("max-tokens", 64), ("max-num-seqs", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter-rate", type=float, default=0.5, help="adapter requests per step")
    parser.add_argument("--base-rate", type=float, default=0.5, help="base requests per step")
    parser.add_argument("--completions", type=int, help="measure a short request after one with so many completions")
    options = parser.parse_args()
    if options.completions is not None:
        for count in (0, options.completions):
            for adapter in (None, 0):
                measure_short_request(adapter, count)
        return
    jobs = make_jobs(options)
    alone = [Job(job.arrival_step, None, job.num_tokens) for job in jobs if job.adapter is None]
    for what, traffic in (("with adapters", jobs), ("alone", alone)):
        run = serve(options, traffic)
        print(f"{what}: {run.num_steps} steps, {run.num_s:.1f} s")
        if what != "alone":
            print(describe("  adapter requests wait", [job.wait for job in traffic if job.adapter is not None]))
        print(describe("  base requests, latency", [job.latency for job in traffic if job.adapter is None]))


if __name__ == "__main__":
    main()
