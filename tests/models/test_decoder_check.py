"""A decoder whose logits differ between the paged cache and its own attention is refused at load, in one sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmlora import LLM
from mmlora.attention.backend import ATTENTION_NAME
from mmlora.attention.kv_cache import KVLayout
from mmlora.attention.paged import SDPABackend
from mmlora.cli import commands as cli
from mmlora.errors import ConfigError
from mmlora.models.decoder_check import check_decoder
from tests.checkpoints import save_text_model
from tests.equality import Case, Checkpoint, check_cases
from tests.reference import Reference

REFUSED = {
    "diffllama": "DiffLlamaForCausalLM computes other logits on a paged KV cache than with its own attention",
    "doge": "DogeForCausalLM computes other logits on a paged KV cache than with its own attention",
    "deepseek_v3": "DeepseekV3ForCausalLM cannot run on a paged KV cache",
    "gpt_oss": "GptOssForCausalLM cannot run on a paged KV cache: this model's attention has sinks",
    "phimoe": "PhimoeForCausalLM applies its sliding window of 64 tokens in its masks only.*max_model_len=64 or",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_decoder_with_wrong_logits_is_refused(family: str, tmp_path: Path) -> None:
    path = save_text_model(tmp_path / family, family)
    with pytest.raises(ConfigError, match=REFUSED[family]):
        LLM(str(path), dtype="float32", device="cpu", max_model_len=128)


def test_a_window_longer_than_max_model_len_does_not_matter(tmp_path: Path) -> None:
    path = save_text_model(tmp_path / "phimoe", "phimoe")
    llm = LLM(str(path), dtype="float32", device="cpu", max_model_len=64, max_logprobs=-1, max_num_batched_tokens=16)
    checkpoint = Checkpoint(path, {}, Reference(path))
    check_cases(llm, checkpoint, [Case("text", "<|user|>How many dogs can you count?<|end|><|assistant|>")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["diffllama", "doge"])
def test_errors_are_detected_in_half_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_text_model(tmp_path / family, family)
    with pytest.raises(ConfigError, match=REFUSED[family]):
        LLM(str(path), dtype=str(dtype).removeprefix("torch."), device="cpu", max_model_len=128)


def test_rounding_in_a_deep_model_with_a_large_vocabulary_is_accepted() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=48, initializer_range=0.1, **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation(ATTENTION_NAME)
    check_decoder(model, None, SDPABackend(), KVLayout(48, 2, 16, 16, torch.bfloat16), 128)


def test_a_model_that_computes_nan_is_refused(tmp_path: Path) -> None:
    path = save_text_model(tmp_path / "llama", "llama")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match="LlamaForCausalLM computes NaN or infinity for plain text in dtype='float16'"
    ):
        LLM(str(path), dtype="float16", device="cpu", max_model_len=128)


def test_the_command_prints_the_reason_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_text_model(tmp_path / "doge", "doge")
    assert cli.main(["serve", str(path), "--port", "0", "--device", "cpu"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and "DogeForCausalLM computes other logits" in message
