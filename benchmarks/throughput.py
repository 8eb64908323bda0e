"""Compare the throughput of the engine, of transformers and of PEFT on a random Llama, in tokens per second.

All prompts are submitted at once and decoded greedily to the same length. Adapters have rank 16 on all Linears and
alternate over the prompts (in PEFT through `adapter_names`). All run in one process.

    .venv/bin/python benchmarks/throughput.py
"""

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import transformers

from mmlora import BASE, LLM, LoRARequest, SamplingParams
from mmlora.assets.models import assistant_path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB_SIZE = 32000


def save_model(folder: Path, options: argparse.Namespace) -> Path:
    """Save a random Llama and its adapters; the tokenizer is the assistant's, and its text does not matter."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 256,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(assistant_path()).save_pretrained(folder / "model")
    for index in range(options.adapters):
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False))
        tuned.save_pretrained(folder / f"adapter-{index}")
        model = tuned.unload()
    return folder / "model"


def tokens_per_second(what: str, num_tokens: int, generate: Callable[[], object], device: str) -> None:
    """Warm up, measure twice, and print the better result."""
    generate()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        generate()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    print(f"| {what} | {num_tokens / min(times):,.0f} |", flush=True)


def run_engine(path: Path, prompts: list[list[int]], options: argparse.Namespace) -> None:
    llm = LLM(
        str(path),
        device=options.device,
        dtype=options.dtype,
        enable_lora=True,
        max_loras=options.adapters,
        max_num_seqs=len(prompts),
        max_model_len=2048,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
    adapters = [LoRARequest(f"adapter-{i}", i + 1, str(path.parent / f"adapter-{i}")) for i in range(options.adapters)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    mixed = [adapters[i % len(adapters)] for i in range(len(prompts))]
    for what, loras in (("base", [BASE] * len(prompts)), (f"{len(adapters)} adapters", mixed)):
        generate = partial(llm.generate, inputs, params, loras, use_tqdm=False)
        tokens_per_second(f"mmlora, {what}", len(prompts) * options.tokens, generate, options.device)


def run_references(path: Path, prompts: list[list[int]], options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(options.device)
    ids = torch.tensor(prompts, device=options.device)
    limits = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    limits["attention_mask"] = torch.ones_like(ids)
    num_tokens = ids.shape[0] * options.tokens
    tokens_per_second("transformers generate, base", num_tokens, lambda: model.generate(ids, **limits), options.device)
    names = [f"adapter-{i}" for i in range(options.adapters)]
    tuned = peft.PeftModel.from_pretrained(model, path.parent / names[0], names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        tuned.load_adapter(path.parent / name, name, autocast_adapter_dtype=False)
    chosen = [names[i % len(names)] for i in range(len(prompts))]
    tokens_per_second(
        f"PEFT generate, {len(names)} adapters",
        num_tokens,
        lambda: tuned.eval().generate(input_ids=ids, adapter_names=chosen, **limits),
        options.device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    print(f"{name}, {versions}\n{vars(options)}\n\n| system | tokens/s |\n|---|---|")
    prompts = torch.randint(10, 400, (options.prompts, options.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder), options)
        run_engine(path, prompts, options)
        run_references(path, prompts, options)


if __name__ == "__main__":
    main()
