"""Fairness: 64 adapters over 4 slots with base-model traffic; time is measured in scheduler steps.

The longest wait is compared with the mean under contention. Under light load the mean is near zero, so the longest wait
itself is bounded.
"""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from mmlora import BASE, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from mmlora.engine.block_manager import BlockManager
from mmlora.engine.scheduler import MAX_WAIT_STEPS, Scheduler
from mmlora.engine.sequence import Status
from mmlora.lora.layers.slots import LoRASlots
from tests.checkpoints import AdapterSpec, randomize_adapter, save_adapter, save_text_model
from tests.engine.sequences import make_adapter, make_group, make_sequence
from tests.engine.test_scheduler import A, B, C, add, make_scheduler, run_to_end, step

NUM_ADAPTERS, NUM_SLOTS = 64, 4
MAX_TOKENS = 64
ZIPF = [1 / rank for rank in range(1, NUM_ADAPTERS + 1)]
STEEP_ZIPF = [rank**-1.5 for rank in range(1, NUM_ADAPTERS + 1)]
FOUR_HOT = [0.9 / 4] * 4 + [0.1 / 60] * 60


@dataclass(frozen=True)
class Job:
    """A request that arrives before a step; `adapter` is its number, None for the base model."""

    step: int
    adapter: int | None
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass
class Figures:
    """Waits and latencies of a run, in steps."""

    adapter_waits: list[int] = field(default_factory=list)  # until a request runs
    base_waits: list[int] = field(default_factory=list)
    base_latencies: list[int] = field(default_factory=list)  # until it is finished

    @property
    def mean_wait(self) -> float:
        return sum(self.adapter_waits) / len(self.adapter_waits)

    @property
    def ratio(self) -> float:
        """Return the longest wait of an adapter request relative to the mean."""
        return max(self.adapter_waits) / self.mean_wait

    @property
    def base_p99(self) -> int:
        return p99(self.base_latencies)

    def __str__(self) -> str:
        return (
            f"{len(self.adapter_waits)} adapter requests wait {self.mean_wait:.0f} steps on average, p99 "
            f"{p99(self.adapter_waits)}, max {max(self.adapter_waits)} = {self.ratio:.1f} x mean; "
            f"{len(self.base_latencies)} base requests, latency p99 {self.base_p99} steps"
        )


def p99(values):
    return sorted(values)[int(0.99 * len(values))]


def make_traffic(seed, num_steps, adapter_rate, base_rate=0.2, weights=ZIPF, max_tokens=MAX_TOKENS):
    """Poisson arrivals with a given rate per step, and outputs of 1 to `max_tokens` tokens."""
    rng, jobs = random.Random(seed), []
    for rate, adapters, shares in ((adapter_rate, range(NUM_ADAPTERS), weights), (base_rate, (None,), (1,))):
        time = rng.expovariate(rate)
        while time < num_steps:
            (adapter,) = rng.choices(adapters, shares)
            jobs.append(Job(int(time), adapter, rng.randint(4, 40), rng.randint(1, max_tokens)))
            time += rng.expovariate(rate)
    return sorted(jobs, key=lambda job: job.step)


class Simulation:
    """The scheduler alone, without a model."""

    def __init__(self, *, num_blocks=4096, max_num_seqs=64, budget=256):
        blocks = BlockManager(num_blocks, 16, enable_prefix_caching=False)
        self.scheduler = Scheduler(blocks, LoRASlots(nn.Module(), NUM_SLOTS, "cpu"), max_num_seqs, budget)
        self.adapters = [make_adapter(f"adapter {index}", index + 1) for index in range(NUM_ADAPTERS)]
        self.ids = {}

    @property
    def is_busy(self):
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, index, job):
        adapter = None if job.adapter is None else self.adapters[job.adapter]
        params = SamplingParams(max_tokens=job.num_output_tokens)
        seq = make_sequence(range(job.num_prompt_tokens), params=params, adapter=adapter)
        self.ids[seq] = index
        self.scheduler.add(seq)

    def step(self):
        """Run a step; return the requests that ran and those that finished."""
        items, ended = self.scheduler.schedule(), []
        assert len({item.seq.adapter.identity for item in items if item.seq.adapter}) <= NUM_SLOTS
        for item in items:
            assert len(item.seq.block_table) * self.scheduler.block_manager.block_size >= item.end
            item.seq.num_computed_tokens = item.end
            if item.is_sampled:
                item.seq.token_ids.append(7)
                if item.seq.num_output_tokens == item.seq.params.max_tokens:
                    self.scheduler.finish(item.seq, "length")
                    ended.append(self.ids[item.seq])
        return [self.ids[item.seq] for item in items], ended


def measure(system, jobs):
    """Run all jobs to the end."""
    figures, seen, num_arrived, num_ended, step = Figures(), set(), 0, 0, 0
    while num_arrived < len(jobs) or system.is_busy:
        while num_arrived < len(jobs) and jobs[num_arrived].step <= step:
            system.add(num_arrived, jobs[num_arrived])
            num_arrived += 1
        ran, ended = system.step()
        for index in set(ran) - seen:
            waits = figures.base_waits if jobs[index].adapter is None else figures.adapter_waits
            waits.append(step - jobs[index].step)
        seen.update(ran)
        figures.base_latencies += [step - jobs[index].step + 1 for index in ended if jobs[index].adapter is None]
        num_ended += len(ended)
        step += 1
    assert num_ended == len(seen) == len(jobs)
    return figures


def base_only(jobs):
    return [job for job in jobs if job.adapter is None]


def check(figures, alone):
    assert figures.ratio <= 4
    assert figures.base_p99 <= 1.5 * alone.base_p99


LOADS = {
    "moderate": {"adapter_rate": 0.3},
    "busy": {"adapter_rate": 1},
    "saturated": {"adapter_rate": 3},
    "steep": {"adapter_rate": 1, "weights": STEEP_ZIPF},
    "four hot": {"adapter_rate": 1, "weights": FOUR_HOT},
}


@pytest.mark.parametrize("load", ["busy", "four hot"])
def test_no_adapter_waits_long_and_the_base_is_not_slowed(load):
    jobs = make_traffic(0, 600, **LOADS[load])
    check(measure(Simulation(), jobs), measure(Simulation(), base_only(jobs)))


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
def test_fairness_holds_for_other_loads_and_seeds(load, capsys):
    for seed in range(5):
        jobs = make_traffic(seed, 4000, **LOADS[load])
        figures, alone = measure(Simulation(), jobs), measure(Simulation(), base_only(jobs))
        check(figures, alone)
        with capsys.disabled():
            print(f"\nfairness, {load}, seed {seed}: {figures}, alone {alone.base_p99}", end="")


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [{"max_num_seqs": 8}, {"max_num_seqs": 256, "budget": 2048}, {"num_blocks": 60}],
    ids=["few places", "many places", "few blocks"],
)
def test_fairness_holds_for_each_scarce_resource(limits):
    jobs = make_traffic(1, 3000, adapter_rate=0.5, base_rate=0.05)
    check(measure(Simulation(**limits), jobs), measure(Simulation(**limits), base_only(jobs)))


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
def test_under_light_load_the_longest_wait_is_bounded(rate):
    figures = measure(Simulation(), make_traffic(3, 3000, adapter_rate=rate))
    assert max(figures.adapter_waits) <= MAX_WAIT_STEPS + MAX_TOKENS
    assert figures.mean_wait < MAX_WAIT_STEPS / 2
    assert max(figures.base_waits) <= 1


def test_base_requests_start_at_once_under_adapter_overload():
    jobs = make_traffic(4, 400, adapter_rate=6)
    assert max(measure(Simulation(max_num_seqs=32), jobs).base_waits) <= 1


class Engine:
    """The real engine on a tiny model."""

    def __init__(self, model, adapters):
        self.engine = LLMEngine(
            EngineArgs(
                str(model),
                enable_lora=True,
                max_loras=NUM_SLOTS,
                max_cpu_loras=NUM_ADAPTERS,
                max_num_seqs=32,
                max_num_batched_tokens=128,
                max_model_len=128,
            )
        )
        self.loras = [LoRARequest(path.name, index, str(path)) for index, path in enumerate(adapters, 1)]
        self.ran = []
        schedule = self.engine.scheduler.schedule

        def recorded():
            items = schedule()
            self.ran = [int(item.seq.request.request_id) for item in items]
            return items

        self.engine.scheduler.schedule = recorded

    @property
    def is_busy(self):
        return self.engine.has_unfinished_requests

    def add(self, index, job):
        params = SamplingParams(max_tokens=job.num_output_tokens, temperature=0.0, ignore_eos=True)
        prompt = {"prompt_token_ids": [7 + (index + i) % 50 for i in range(job.num_prompt_tokens)]}
        self.engine.add_request(str(index), prompt, params, BASE if job.adapter is None else self.loras[job.adapter])

    def step(self):
        outputs = self.engine.step()
        assert all(output.error is None for output in outputs)
        return self.ran, [int(output.request_id) for output in outputs if output.finished]


@pytest.fixture(scope="module")
def model_with_adapters(tmp_path_factory):
    """A tiny Llama and 64 adapters for it."""
    folder = tmp_path_factory.mktemp("fairness")
    model = save_text_model(folder / "model", "llama")
    first = save_adapter(model, folder / "adapter-0", AdapterSpec(r".*self_attn\.(q|v)_proj", 0, 4))
    paths = [first, *(folder / f"adapter-{index}" for index in range(1, NUM_ADAPTERS))]
    for index, path in enumerate(paths[1:], 1):
        randomize_adapter(Path(shutil.copytree(first, path)), index)
    return model, paths


def check_engine(model_with_adapters, jobs, capsys):
    figures = measure(Engine(*model_with_adapters), jobs)
    alone = measure(Engine(*model_with_adapters), base_only(jobs))
    with capsys.disabled():
        print(f"\nfairness, real engine: {figures}, alone {alone.base_p99}")
    check(figures, alone)


def test_the_real_engine_is_fair(model_with_adapters, capsys):
    jobs = make_traffic(0, 150, adapter_rate=1, max_tokens=16)
    check_engine(model_with_adapters, jobs, capsys)


@pytest.mark.slow
def test_the_real_engine_is_fair_for_long(model_with_adapters, capsys):
    check_engine(model_with_adapters, make_traffic(1, 1500, adapter_rate=1), capsys)


@pytest.mark.parametrize(
    "adapters", [(None, None), (A, A), (None, A), (A, None), (A, B)], ids="base AA base-A A-base AB".split()
)
@pytest.mark.parametrize("kind", ["n", "batch"])
def test_a_request_with_many_sequences_does_not_hold_back_another(adapters, kind):
    scheduler = make_scheduler(max_loras=2)
    group = "batch" if kind == "batch" else None
    big = make_group(n=40, adapter=adapters[0], max_tokens=100, group=group)
    for seq in big:
        scheduler.add(seq)
    for _ in range(10):
        step(scheduler)
    assert len(scheduler.running) == 8
    short = make_group(adapter=adapters[1])[0]
    scheduler.add(short)
    for _ in range(5):
        step(scheduler)
    assert short.status is Status.FINISHED and scheduler.num_preemptions == 1
    assert len(scheduler.running) in (7, 8)
    run_to_end(scheduler)
    assert all(seq.num_output_tokens == 100 for seq in big)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_requests_alternate_in_few_places(max_num_seqs):
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    big = make_group(n=12, max_tokens=3)
    for seq in big:
        scheduler.add(seq)
    step(scheduler)
    others = [make_group(max_tokens=3)[0] for _ in range(3)]
    for seq in others:
        scheduler.add(seq)
    while any(seq.status is not Status.FINISHED for seq in others):
        step(scheduler)
    assert sum(seq.status is Status.FINISHED for seq in big) <= 1 + 3 + max_num_seqs
    run_to_end(scheduler)


def test_many_long_prompts_hold_back_another_for_one_prefill():
    scheduler = make_scheduler(num_blocks=400, max_num_seqs=64, budget=16)
    for seq in make_group(length=60, n=20, max_tokens=4, group="batch"):
        scheduler.add(seq)
    for _ in range(6):
        step(scheduler)
    short = make_group()[0]
    scheduler.add(short)
    num_steps = 0
    while short.status is Status.WAITING:
        step(scheduler)
        num_steps += 1
    assert num_steps <= -(-60 // 16) + 1
    run_to_end(scheduler)


def test_a_request_with_many_sequences_leaves_blocks_for_another():
    scheduler = make_scheduler(num_blocks=24, max_num_seqs=16)
    for seq in make_group(n=16, max_tokens=60):
        scheduler.add(seq)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert scheduler.block_manager.num_free_blocks < 3
    short = make_group(length=9)[0]
    scheduler.add(short)
    for _ in range(5):
        step(scheduler)
    assert short.status is Status.FINISHED
    run_to_end(scheduler)


def test_two_large_groups_share_the_places_and_then_leave_each_other_alone():
    scheduler = make_scheduler(num_blocks=200, max_num_seqs=8)
    first, second = make_group(n=20, max_tokens=50), make_group(n=20, max_tokens=50)
    for seqs in (first, second):
        for seq in seqs:
            scheduler.add(seq)
        for _ in range(5):
            step(scheduler)
    assert [sum(seq in seqs for seq in scheduler.running) for seqs in (first, second)] == [4, 4]
    assert scheduler.num_preemptions == 4
    run_to_end(scheduler)
    assert scheduler.num_preemptions == 4, "places that become free are shared without preemption"


def test_requests_of_one_sequence_each_are_not_preempted_for_places():
    scheduler = make_scheduler(max_num_seqs=4)
    for _ in range(12):
        add(scheduler, max_tokens=9)
        step(scheduler)
    run_to_end(scheduler)
    assert scheduler.num_preemptions == 0


def test_a_group_preempts_no_better_priority():
    blocks = BlockManager(64, 4, enable_prefix_caching=False)
    scheduler = Scheduler(blocks, LoRASlots(nn.Module(), 1, "cpu"), 4, 64, is_by_priority=True)
    for seq in make_group(n=8, max_tokens=20, priority=1):
        scheduler.add(seq)
    step(scheduler)
    worse, equal = make_group(priority=2)[0], make_group(priority=1)[0]
    scheduler.add(worse)
    for _ in range(3):
        step(scheduler)
    assert worse.status is Status.WAITING and scheduler.num_preemptions == 0
    scheduler.add(equal)
    step(scheduler)
    assert equal.status is Status.RUNNING and scheduler.num_preemptions == 1
    run_to_end(scheduler)


@pytest.mark.parametrize("seed", range(8))
def test_random_groups_all_finish_without_endless_preemption(seed):
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=rng.choice([24, 200]), max_loras=2, max_num_seqs=rng.choice([1, 5, 16]), prefix_caching=True
    )
    seqs = []
    for _ in range(60):
        if rng.random() < 0.4:
            adapter = rng.choice([None, None, A, B, C])
            group = make_group(rng.randint(1, 12), rng.choice([1, 1, 1, 6, 30]), adapter, rng.randint(1, 12))
            seqs += group
            for seq in group:
                scheduler.add(seq)
        step(scheduler)
    run_to_end(scheduler, 20_000)
    assert all(seq.num_output_tokens == seq.params.max_tokens for seq in seqs)
    if scheduler.block_manager.num_blocks > 100:
        assert scheduler.num_preemptions <= len(seqs)


@pytest.mark.parametrize("adapter", [None, 0])
def test_the_outputs_of_groups_are_those_of_each_alone(model_with_adapters, adapter):
    model, paths = model_with_adapters
    options = {"max_num_seqs": 6, "max_model_len": 128, "enable_lora": True}
    engine = LLMEngine(EngineArgs(str(model), **options))
    lora = BASE if adapter is None else LoRARequest("a", 1, str(paths[adapter]))
    several = SamplingParams(n=20, seed=3, temperature=1.0, max_tokens=30, ignore_eos=True)
    short = SamplingParams(seed=4, temperature=1.0, max_tokens=3, ignore_eos=True)

    def finish():
        outputs = []
        while engine.has_unfinished_requests:
            outputs += engine.step()
        return {o.request_id: [completion.token_ids for completion in o.outputs] for o in outputs if o.finished}

    alone = {}
    for name, params in (("big", several), ("short", short)):
        engine.add_request(name, [5, 6, 7], params, lora)
        alone |= finish()
    engine.add_request("big", [5, 6, 7], several, lora)
    for _ in range(10):
        engine.step()
    assert len(engine.scheduler.running) == 6
    engine.add_request("short", [5, 6, 7], short, lora)
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [o.outputs[0].token_ids for o in outputs if o.request_id == "short" and o.finished] == alone["short"]
    assert finish()["big"] == alone["big"] and engine.scheduler.num_preemptions == 1
