"""Options of vLLM that mmlora does not have: the values that change nothing here, and why others are refused.

`LLM(...)` and `mmlora serve` both read this table, so that scripts and command lines written for vLLM can stay as they
are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mmlora.utils.text import shorten


@dataclass(frozen=True)
class VLLMOption:
    """An option that is accepted and ignored.

    Attributes:
        reason: why it has no effect, or what to do instead of a refused value.
        allowed: the values that change nothing, besides None and empty ones; None for every value.
        is_switch: whether the command line writes it as `--name` and `--no-name`, without a value.
    """

    reason: str
    allowed: tuple[object, ...] | None = None
    is_switch: bool = False

    def accepts(self, value: object) -> bool:
        """Return whether a value changes nothing."""
        return is_unset(value) or self.allowed is None or value in self.allowed

    @property
    def allowed_text(self) -> str:
        """The allowed values, for an error."""
        *others, last = map(repr, self.allowed or (None,))
        if others:
            return f"{', '.join(others)} and {last} are the only supported values"
        return f"{last} is the only supported value"


def is_unset(value: object) -> bool:
    """Return whether an option is given without a value."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _any(reason: str, names: str, switches: str = "") -> Iterator[tuple[str, VLLMOption]]:
    """Options of which no value changes anything."""
    yield from ((name, VLLMOption(reason)) for name in names.split())
    yield from ((name, VLLMOption(reason, is_switch=True)) for name in switches.split())


def _only(reason: str, allowed: tuple[object, ...], names: str) -> Iterator[tuple[str, VLLMOption]]:
    """Options of which only some values change nothing."""
    yield from ((name, VLLMOption(reason, allowed)) for name in names.split())


def _off(reason: str, names: str) -> Iterator[tuple[str, VLLMOption]]:
    """Switches that must be off."""
    yield from ((name, VLLMOption(reason, (False,), is_switch=True)) for name in names.split())


VLLM_OPTIONS: Final[Mapping[str, VLLMOption]] = dict(
    [
        # Values that select what mmlora does anyway.
        *_only(
            "one process serves one device; start one server per device behind a load balancer",
            (1,),
            "tensor_parallel_size pipeline_parallel_size data_parallel_size data_parallel_size_local api_server_count "
            "prefill_context_parallel_size decode_context_parallel_size nnodes",
        ),
        *_only("one process serves one device", ("mp", "uni", "ray"), "distributed_executor_backend"),
        *_only("one process serves one device", (0,), "node_rank data_parallel_rank data_parallel_start_rank"),
        *_only("quantized weights are not supported; use a checkpoint that is not quantized", (), "quantization"),
        *_only("weights are read from safetensors files", ("auto", "hf", "safetensors"), "load_format"),
        *_only("the configuration is read from config.json", ("auto", "hf"), "config_format"),
        *_only("the KV cache has the model's dtype", ("auto",), "kv_cache_dtype"),
        *_only("adapters have the model's dtype", ("auto",), "lora_dtype"),
        *_only("the model's fast tokenizer is used", ("auto", "hf", "fast"), "tokenizer_mode"),
        *_only("mmlora generates text", ("auto", "generate"), "task runner"),
        *_only("mmlora generates text", ("auto", "none"), "convert"),
        *_only("models run in transformers", ("auto", "transformers"), "model_impl"),
        *_only("the format is detected from the chat template", ("auto",), "chat_template_content_format"),
        *_only("responses have the role assistant", ("assistant",), "response_role"),
        *_only("log probabilities are those of the model's logits", ("raw_logprobs",), "logprobs_mode"),
        *_only("weights stay on the device", (0,), "cpu_offload_gb"),
        *_only("--revision applies to the tokenizer, too", ("main",), "tokenizer_revision code_revision"),
        # Options without a counterpart, which must be unset.
        *_only("outputs are the same without speculative decoding; leave it out", (), "speculative_config"),
        *_only("outputs are the same without speculative decoding; leave it out", (), "speculative_model"),
        *_only("outputs are the same without speculative decoding; leave it out", (0,), "num_speculative_tokens"),
        *_only("set HF_TOKEN in the environment", (False,), "hf_token"),
        *_only("set HF_HUB_CACHE in the environment", (), "download_dir"),
        *_only("edit the model's config.json", (), "hf_overrides hf_config_path rope_scaling rope_theta"),
        *_only("send the fields with each request, or edit generation_config.json", (), "override_generation_config"),
        *_only("send chat_template_kwargs with each request", (), "default_chat_template_kwargs"),
        *_only("use kv_cache_memory_bytes", (), "num_gpu_blocks_override"),
        *_only("logits processors are not supported", (), "logits_processors logits_processor_pattern"),
        *_only("not supported; leave it out", (), "kv_transfer_config kv_events_config ec_transfer_config middleware"),
        *_only("not supported; leave it out", (), "pooler_config tool_parser_plugin tool_server log_config_file"),
        *_only("not supported; leave it out", ("auto",), "worker_cls worker_extension_cls scheduler_cls"),
        *_only("not supported; leave it out", (0,), "kv_offloading_size long_lora_scaling_factors media_io_kwargs"),
        *_off("code of checkpoints is never run; leave it out", "trust_remote_code"),
        *_off("not supported; leave it out", "skip_tokenizer_init enable_sleep_mode enable_mm_embeds"),
        *_off("not supported; leave it out", "enable_prompt_adapter enable_prompt_embeds calculate_kv_scales headless"),
        *_off("not supported; leave it out", "disable_sliding_window interleave_mm_strings enable_ssl_refresh"),
        *_off("set stream_options in each request", "enable_force_include_usage"),
        *_off("set return_tokens_as_token_ids in each request", "return_tokens_as_token_ids"),
        # Options about speed, memory and logs.
        *_any("there is no swap space: preempted requests are recomputed", "swap_space preemption_mode"),
        *_any("requests are logged only with --log-requests", "max_log_len"),
        *_any("requests are logged only with --log-requests", "", "disable_log_requests enable_log_requests"),
        *_any("requests are logged only with --log-requests", "", "enable_log_outputs enable_log_deltas"),
        *_any("statistics are at /metrics", "show_hidden_metrics_for_version collect_detailed_traces"),
        *_any("statistics are at /metrics", "", "disable_log_stats enable_server_load_tracking kv_cache_metrics"),
        *_any("the access log is part of uvicorn_log_level", "", "disable_uvicorn_access_log log_error_stack"),
        *_any("prefill is always chunked", "max_num_partial_prefills max_long_partial_prefills"),
        *_any("prefill is always chunked", "long_prefill_token_threshold", "enable_chunked_prefill"),
        *_any("prefill is always chunked", "", "disable_chunked_mm_input"),
        *_any("this version always runs eagerly", "max_seq_len_to_capture max_context_len_to_capture"),
        *_any("this version always runs eagerly", "compilation_config optimization_level cudagraph_capture_sizes"),
        *_any("this version always runs eagerly", "max_cudagraph_capture_size"),
        *_any("the scheduler has no such option", "scheduler_delay_factor num_scheduler_steps num_lookahead_slots"),
        *_any("the scheduler has no such option", "stream_interval", "async_scheduling multi_step_stream_outputs"),
        *_any("attention is chosen by the device", "attention_backend mm_encoder_attn_backend attention_config"),
        *_any("attention is chosen by the device", "", "disable_cascade_attn kv_sharing_fast_prefill"),
        *_any("the prefix cache has one hash", "prefix_caching_hash_algo"),
        *_any("there is one block manager", "", "use_v2_block_manager disable_hybrid_kv_cache_manager"),
        *_any("one process serves one device", "all2all_backend", "disable_custom_all_reduce enable_expert_parallel"),
        *_any("one process serves one device", "", "disable_frontend_multiprocessing fully_sharded_loras"),
        *_any("adapters load with everything that PEFT saves", "lora_extra_vocab_size", "enable_lora_bias"),
        *_any("adapters load with everything that PEFT saves", "", "specialize_active_lora"),
        *_any("constraints are compiled by mmlora", "guided_decoding_backend structured_outputs_config"),
        *_any("media are cached by encoder_cache_memory_bytes", "mm_processor_cache_gb mm_processor_cache_type"),
        *_any("media are cached by encoder_cache_memory_bytes", "", "disable_mm_preprocessor_cache"),
        *_any("memory is not profiled", "mm_encoder_tp_mode", "skip_mm_profiling"),
        *_any("videos are not supported", "video_pruning_rate"),
        *_any("loading has no such option", "max_parallel_loading_workers pt_load_map_location ignore_patterns"),
        *_any("loading has no such option", "model_loader_extra_config", "use_tqdm_on_load"),
        *_any("responses always have it", "", "enable_prompt_tokens_details"),
        *_any("the API has no such switch", "", "disable_fastapi_docs enable_offline_docs"),
        *_any("the API has no such switch", "", "trust_request_chat_template enable_request_id_headers"),
        *_any("the API has no such switch", "", "enable_tokenizer_info_endpoint"),
        *_any("request heads have fixed limits", "h11_max_incomplete_event_size h11_max_header_count"),
    ]
)
SHORT_FLAGS: Final[Mapping[str, str]] = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "quantization": "-q",
    "optimization_level": "-O",
}
# Values of vLLM for options that mmlora has, with what they are here; None is the default.
SAME_VALUES: Final[Mapping[tuple[str, object], object]] = {
    ("max_model_len", -1): None,
    ("max_model_len", "auto"): None,
    ("generation_config", "vllm"): "none",
}


def remove_vllm_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Separate options of vLLM from the others.

    Returns:
        The other options, with vLLM's values replaced; the ignored options, each with its reason; and the problems
        with those that would have an effect.
    """
    others, ignored, problems = dict[str, Any](), list[str](), list[str]()
    for name, value in options.items():
        option = VLLM_OPTIONS.get(name)
        if option is None:
            is_same = isinstance(value, str | int) and (name, value) in SAME_VALUES
            others[name] = SAME_VALUES[name, value] if is_same else value
        elif option.accepts(value):
            ignored += [] if is_unset(value) else [f"{name} ({option.reason})"]
        else:
            shown = "***" if name == "hf_token" else shorten(value)
            problems.append(f"{name}={shown}: {option.allowed_text}; {option.reason}")
    return others, ignored, problems


def ignored_line(ignored: list[str]) -> str:
    """Return the log line about ignored options."""
    return f"ignored options of vLLM, which have no effect here: {', '.join(ignored)}"
