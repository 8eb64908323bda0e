"""Cache poisoning: adapters with large opposite deltas are reloaded under their names while requests run.

Each output is compared with that of transformers + PEFT for the version and prompt of the request. A stale KV block,
media embedding or mix would change it.
"""

import itertools
import random
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmlora import BASE, LLM, LoRAMix, LoRARequest
from tests.checkpoints import AdapterSpec, load_reference, phi4_targets, save_adapter, save_phi4
from tests.equality import greedy
from tests.media import clip, picture
from tests.reference import Media, Reference

NUM_TOKENS = 4
SIGNS = ("plus", "minus")
NAMES = {"a": phi4_targets(), "b": phi4_targets("language_model", "connector"), "c": phi4_targets("language_model")}
MIXES = ((("a", 0.5), ("b", 0.5)), (("b", 1.5), ("c", -0.5)))
START = "<|user|>A start that all of these prompts share, so that blocks are found. "
CLIP, PICTURE = clip(0.5, 1), picture(40, 40, 2)
PROMPTS = [
    *((f"{START}{word}<|end|><|assistant|>", Media()) for word in ("One", "Two dogs", "Three", "No more than four")),
    ("<|user|><|audio|>Write it down<|end|><|assistant|>", Media(audios=[CLIP])),
    (f"{START}<|audio|>!<|end|><|assistant|>", Media(audios=[CLIP])),
    ("<|user|><|image|>What is it?<|end|><|assistant|>", Media(images=[PICTURE])),
    (f"{START}<|image|>and <|audio|><|end|><|assistant|>", Media(audios=[CLIP], images=[PICTURE])),
]
State = tuple[tuple[str, str, float], ...]
"""Adapters of a request as `(name, sign, scale)`; empty for the base model."""


@dataclass
class World:
    """The checkpoint, both versions of every adapter, and the expected outputs."""

    model: Path
    versions: dict[tuple[str, str], Path]
    reference: Reference
    answers: dict[tuple[State, int], list[int]] = field(default_factory=dict)

    def expected(self, state: State, prompt: int) -> list[int]:
        """Return the output of transformers + PEFT, computed once."""
        if (state, prompt) not in self.answers:
            text, media = PROMPTS[prompt]
            adapter = self._saved_mix(state) if len(state) > 1 else self.versions[state[0][:2]] if state else None
            self.answers[state, prompt] = self.reference.generate(text, media, adapter, NUM_TOKENS).token_ids
        return self.answers[state, prompt]

    def _saved_mix(self, state: State) -> Path:
        """Combine adapters by PEFT, and save the result as one."""
        path = self.model.parent / "-".join(f"{name}{sign}" for name, sign, _ in state)
        if not path.exists():
            paths = {f"{name}": self.versions[name, sign] for name, sign, _ in state}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                first, *others = paths
                net = PeftModel.from_pretrained(load_reference(self.model), paths[first], adapter_name=first)
                for name in others:
                    net.load_adapter(paths[name], name)
                net.add_weighted_adapter(list(paths), [scale for *_, scale in state], "mix", combination_type="cat")
                net.save_pretrained(path.parent, selected_adapters=["mix"])
            (path.parent / "mix").rename(path)
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("poison")
    model = save_phi4(folder / "model")
    versions = {}
    for seed, (name, targets) in enumerate(NAMES.items()):
        path = save_adapter(model, folder / f"{name}-plus", AdapterSpec(targets, seed + 50, 4, {"lora_alpha": 16}))
        opposite = Path(shutil.copytree(path, folder / f"{name}-minus"))
        tensors = load_file(opposite / "adapter_model.safetensors")
        save_file({k: -t if "lora_B" in k else t for k, t in tensors.items()}, opposite / "adapter_model.safetensors")
        versions |= {(name, "plus"): path, (name, "minus"): opposite}
    return World(model, versions, Reference(model))


class Poisoner:
    """Sends requests and reloads to one engine, and checks every output."""

    def __init__(self, world: World, folder: Path, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.engine = LLM(
            str(world.model),
            enable_lora=True,
            max_loras=2,
            block_size=8,
            max_model_len=160,
            max_num_seqs=12,
            max_num_batched_tokens=96,
            kv_cache_memory_bytes=2 * 2**20,
            dtype="float32",
            device="cpu",
        ).llm_engine
        self.live = {name: Path(shutil.copytree(world.versions[name, "plus"], folder / name)) for name in NAMES}
        self.signs = dict.fromkeys(NAMES, "plus")
        self.digests: dict[tuple[str, str], set[str]] = {}
        self.running: dict[str, tuple[State, int]] = {}
        self.num_checked = self.num_reloads = self.num_cached = 0
        self._ids = itertools.count()

    def run(self, num_requests: int) -> None:
        """Keep up to 24 requests in flight, with a reload before about one step in eight."""
        while self.num_checked < num_requests:
            while len(self.running) < 24 and self.num_checked + len(self.running) < num_requests:
                self._send()
            if self.rng.random() < 0.12:
                self._reload()
            for output in self.engine.step():
                if output.finished:
                    self._check(output)

    def _send(self) -> None:
        prompt = self.rng.randrange(len(PROMPTS))
        text, media = PROMPTS[prompt]
        choice = self.rng.choice([None, *NAMES, *NAMES, *MIXES])
        parts = () if choice is None else ((choice, 1.0),) if isinstance(choice, str) else choice
        state = tuple((name, self.signs[name], scale) for name, scale in parts)
        requests = [(self._request(name), scale) for name, scale in parts]
        lora: Any = BASE if not requests else requests[0][0] if len(requests) == 1 else LoRAMix(requests)
        request_id = str(next(self._ids))
        prompt_data = {"prompt": text, "multi_modal_data": media.as_prompt_data}
        self.engine.add_request(request_id, prompt_data, greedy(max_tokens=NUM_TOKENS), lora)
        self.running[request_id] = (state, prompt)

    def _request(self, name: str, **options: Any) -> LoRARequest:
        return LoRARequest(name, 1 + list(NAMES).index(name), str(self.live[name]), **options)

    def _reload(self) -> None:
        name = self.rng.choice(list(NAMES))
        self.signs[name] = SIGNS[1 - SIGNS.index(self.signs[name])]
        for file in self.world.versions[name, self.signs[name]].iterdir():
            shutil.copy(file, self.live[name] / file.name)
        self.engine.process_input("reload", "x", None, self._request(name, load_inplace=True))
        self.num_reloads += 1

    def _check(self, output: Any) -> None:
        state, prompt = self.running.pop(output.request_id)
        assert output.error is None, output.error
        assert output.outputs[0].token_ids == self.world.expected(state, prompt), (state, PROMPTS[prompt][0])
        if len(state) == 1:
            self.digests.setdefault(state[0][:2], set()).add(output.lora.digest)
        self.num_checked += 1
        self.num_cached += output.num_cached_tokens > 0


@pytest.mark.parametrize("num_requests", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_output_is_stale(world: World, tmp_path: Path, num_requests: int, capsys: pytest.CaptureFixture) -> None:
    poisoner = Poisoner(world, tmp_path, num_requests)
    with torch.inference_mode():
        poisoner.run(num_requests)
    encoder = poisoner.engine.runner.encoder
    with capsys.disabled():
        print(
            f"\n{poisoner.num_checked} answers, {poisoner.num_reloads} reloads, {poisoner.num_cached} from the prefix "
            f"cache, {encoder.num_hits} media from the encoder cache, none stale"
        )
    assert poisoner.num_cached > num_requests / 10 and encoder.num_hits > encoder.num_encoded
    assert all(len(found) == 1 for found in poisoner.digests.values()) and len(poisoner.digests) == 6
    assert len({digest for found in poisoner.digests.values() for digest in found}) == 6


def test_versions_have_different_outputs(world: World) -> None:
    """Where two versions have equal outputs, a stale cache could not be detected."""
    states = [(), *(((name, sign, 1.0),) for name in NAMES for sign in SIGNS)]
    pairs = list(itertools.combinations(states, 2))
    num_told = sum(
        world.expected(one, prompt) != world.expected(other, prompt)
        for one, other in pairs
        for prompt in range(len(PROMPTS))
    )
    assert num_told > 0.9 * len(pairs) * len(PROMPTS)
