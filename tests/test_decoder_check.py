"""A decoder that computes something else on the paged cache than by itself is refused at load, in one sentence."""

from pathlib import Path

import pytest

from mmlora import LLM, cli
from mmlora.errors import ConfigError
from tests.checkpoints import save_text_model
from tests.equality import Case, Checkpoint, check_cases
from tests.reference import Reference

REFUSED = {
    "diffllama": "DiffLlamaForCausalLM gives other logits on a paged KV cache than by itself",
    "doge": "DogeForCausalLM gives other logits on a paged KV cache than by itself",
    "deepseek_v3": "DeepseekV3ForCausalLM cannot run on a paged KV cache",
    "gpt_oss": "GptOssForCausalLM cannot run on a paged KV cache: this model's attention has sinks",
    "phimoe": "PhimoeForCausalLM hides tokens beyond its sliding window of 64 in its masks only.*max_model_len=64 or",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_decoder_that_would_be_wrong_is_refused(family: str, tmp_path: Path) -> None:
    path = save_text_model(tmp_path / family, family)
    with pytest.raises(ConfigError, match=REFUSED[family]):
        LLM(str(path), dtype="float32", device="cpu", max_model_len=128)


def test_a_window_that_cannot_be_reached_does_not_matter(tmp_path: Path) -> None:
    path = save_text_model(tmp_path / "phimoe", "phimoe")
    llm = LLM(str(path), dtype="float32", device="cpu", max_model_len=64, max_logprobs=-1, max_num_batched_tokens=16)
    checkpoint = Checkpoint(path, {}, Reference(path))
    check_cases(llm, checkpoint, [Case("text", "<|user|>How many dogs can you count?<|end|><|assistant|>")])


def test_the_command_says_so_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_text_model(tmp_path / "doge", "doge")
    assert cli.main(["serve", str(path), "--port", "0", "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and "DogeForCausalLM gives other logits" in message
