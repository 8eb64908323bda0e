"""`EngineArgs`: the options of the engine, validated before anything is loaded.

`LLM(...)`, `AsyncLLM` and `mmlora serve` share them. Checks that need the loaded model (its modalities, its context
length) are in `mmlora.engine.loading`.
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeGuard

from mmlora.errors import ConfigError
from mmlora.processors.media.items import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_DECODE_TIMEOUT_S,
    DEFAULT_FETCH_TIMEOUT_S,
    DEFAULT_LIMITS,
    MediaLimits,
)
from mmlora.processors.modalities import MODALITIES
from mmlora.utils.vllm_options import ignored_line, remove_vllm_options

if TYPE_CHECKING:  # `mmlora --help` needs the options, not torch
    import torch

DTYPE_NAMES: Final = ("float32", "float", "float16", "half", "bfloat16")
AUTO = "auto"
MAX_DECODE_WORKERS: Final = 4  # by default
DOMAIN = re.compile(r"(\*\.)?[^\s/:@*]*")
Groups = Mapping[str, str]  # titles to the names of options, for `--help`
DEFAULT_MAX_LORAS: Final = 8
DEFAULT_MAX_NUM_SEQS: Final = 64
DEFAULT_MAX_NUM_BATCHED_TOKENS: Final = 2048
POSITIVE: Final = (
    *("block_size", "encoder_cache_memory_bytes"),
    *("max_media_bytes", "max_image_pixels", "max_audio_samples", "max_decoded_media_bytes"),
)
POSITIVE_OR_NONE: Final = (
    *("max_model_len", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens"),
    *("max_loras", "max_lora_rank", "max_cpu_loras", "media_decode_workers"),
)
PRIORITY = "priority"
SCHEDULING_POLICIES = ("fcfs", PRIORITY)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineArgs:
    """Options of an engine; names follow vLLM's.

    Args:
        model: directory or Hub id of a `transformers` checkpoint.
        tokenizer: directory or Hub id of the tokenizer; by default the model's.
        revision: Hub revision of the model and tokenizer.
        served_model_name: name, or names, of the base model in requests; by default `model`. Responses repeat the
            requested name, metrics use the first.
        dtype: `auto` (the checkpoint's type, but float32 on CPU), `float32`, `float16` or `bfloat16`. float32 on CUDA
            turns TF32 off in cuDNN for the whole process.
        device: `auto` (CUDA if available), `cpu` or `cuda`.
        seed: seed of requests without a seed.
        max_model_len: maximum length of prompt plus output in tokens; by default the model's context length, or what
            the KV cache holds if that is less.
        max_num_seqs: maximum number of sequences in one step; by default 64, or `max_num_batched_tokens` if that is
            less.
        max_num_batched_tokens: maximum number of tokens in one step; longer prompts are prefilled in chunks. By default
            2048, or `max_num_seqs` if that is more.
        scheduling_policy: `fcfs` (first come, first served, with fair turns for the base model and each adapter) or
            `priority` (lowest `priority` of a request first).
        block_size: tokens in one KV cache block.
        kv_cache_memory_bytes: size of the KV cache; by default 1 GiB on CPU, and on CUDA the part of
            `gpu_memory_utilization` that the weights leave.
        gpu_memory_utilization: fraction of GPU memory for weights and KV cache.
        encoder_cache_memory_bytes: size of the cache of encoded media.
        enable_prefix_caching: reuse KV blocks of equal prefixes (same tokens, media, adapter and cache salt).
        enforce_eager: accepted for compatibility; this version always runs eagerly.
        enable_lora: allow adapters; by default on if an option names adapters, such as `default_mm_loras`.
        max_loras: maximum number of adapters in one step (device slots); by default 8, or `max_cpu_loras` if that is
            less.
        max_lora_rank: maximum adapter rank; unlimited by default.
        max_cpu_loras: number of adapters kept in host memory, by default `4 * max_loras`.
        lora_registry: SQLite file that keeps adapters loaded at run time across restarts.
        default_mm_loras: default adapters: a map from `audio`, `image` or `audio+image` to an adapter's directory or
            Hub id, or `auto` for the adapters bundled with the model.
        enable_tower_connector_lora: accept adapters with tower or connector tensors.
        limit_mm_per_prompt: maximum number of items per modality in one prompt.
        max_media_bytes: maximum encoded size of one media item, in bytes.
        max_image_pixels: maximum image size, width x height.
        max_audio_seconds: maximum audio duration in seconds.
        max_audio_samples: maximum number of audio samples, at any sampling rate.
        max_decoded_media_bytes: maximum size of all media of one prompt, decoded and as features, in bytes.
        allowed_local_media_path: directory whose files `file:` URLs may read; by default none.
        allowed_media_domains: hosts that http(s) URLs may name, `example.org` or `*.example.org`; by default every host
            with public addresses, and with an empty string none.
        allowed_media_networks: networks that http(s) URLs may reach in addition to public addresses, such as
            `10.0.0.0/8`.
        media_fetch_timeout: time limit for fetching an http(s) URL in seconds, redirects included.
        media_decode_timeout: time limit for decoding all media of one prompt in seconds; the process that decodes is
            killed.
        media_decode_workers: maximum number of processes that decode media; by default the number of CPU cores, but at
            most 4.
        media_cache_memory_bytes: size of the cache of media with a client-assigned uuid; 0 disables it.
        mm_processor_kwargs: options of the model's media processor for every request.
        chat_template: Jinja template, or a file with one, that replaces the tokenizer's.
        max_logprobs: maximum `logprobs` of a request; -1 for no limit.
        generation_config: `auto` (sampling defaults from the model's `generation_config.json`) or `none`.

    Raises:
        ConfigError: with every invalid option in one message.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    served_model_name: str | Sequence[str] | None = None
    dtype: "str | torch.dtype" = "auto"
    device: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: str = "fcfs"
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    encoder_cache_memory_bytes: int = 256 * 2**20
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    enable_lora: bool | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_cpu_loras: int | None = None
    lora_registry: str | None = None
    default_mm_loras: Mapping[str, str] | str | None = None
    enable_tower_connector_lora: bool = True
    limit_mm_per_prompt: Mapping[str, int] | None = None
    max_media_bytes: int = DEFAULT_LIMITS.max_bytes
    max_image_pixels: int = DEFAULT_LIMITS.max_pixels
    max_audio_seconds: float = DEFAULT_LIMITS.max_duration_s
    max_audio_samples: int = DEFAULT_LIMITS.max_samples
    max_decoded_media_bytes: int = DEFAULT_LIMITS.max_decoded_bytes
    allowed_local_media_path: str | None = None
    allowed_media_domains: Sequence[str] | None = None
    allowed_media_networks: Sequence[str] | None = None
    media_fetch_timeout: float = DEFAULT_FETCH_TIMEOUT_S
    media_decode_timeout: float = DEFAULT_DECODE_TIMEOUT_S
    media_decode_workers: int | None = None
    media_cache_memory_bytes: int = DEFAULT_CACHE_BYTES
    mm_processor_kwargs: Mapping[str, Any] | None = None
    chat_template: str | None = None
    max_logprobs: int = 20
    generation_config: str = "auto"
    GROUPS: ClassVar[Groups] = {
        "model": "tokenizer revision served_model_name dtype device seed max_model_len chat_template generation_config",
        "LoRA": "enable_lora default_mm_loras max_loras max_lora_rank max_cpu_loras lora_registry "
        "enable_tower_connector_lora",
        "media": "limit_mm_per_prompt mm_processor_kwargs max_media_bytes max_image_pixels max_audio_seconds "
        "max_audio_samples max_decoded_media_bytes allowed_local_media_path allowed_media_domains "
        "allowed_media_networks media_fetch_timeout media_decode_timeout media_decode_workers media_cache_memory_bytes",
        "memory": "kv_cache_memory_bytes gpu_memory_utilization block_size enable_prefix_caching "
        "encoder_cache_memory_bytes",
        "scheduling": "scheduling_policy max_num_seqs max_num_batched_tokens max_logprobs enforce_eager",
    }

    def __post_init__(self) -> None:
        problems = [*self._check_numbers(), *self._check_choices(), *self._check_lora(), *self._check_media()]
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def from_kwargs(cls, model: str, **options: Any) -> "EngineArgs":
        """Create options from the keywords of `LLM(...)`, which may include those of vLLM that change nothing here.

        Raises:
            ConfigError: an option is unknown or invalid.
        """
        allowed = {field.name for field in fields(cls)}
        options, ignored, problems = remove_vllm_options(options)
        unknown = sorted(set(options) - allowed)
        if unknown:
            raise ConfigError(f"unknown option(s) {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")
        try:
            args = cls(model=model, **options)
        except ConfigError as error:
            raise ConfigError(*problems, *error.problems) from None
        if problems:
            raise ConfigError(*problems)
        if ignored:
            logger.warning("%s", ignored_line(ignored))
        return args

    @property
    def model_name(self) -> str:
        """The main name of the base model in requests and metrics."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the base model, the one that metrics use first."""
        names = self.served_model_name or self.model
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def media_limits(self) -> MediaLimits:
        """Size and duration limits of media."""
        return MediaLimits(
            self.max_media_bytes,
            self.max_image_pixels,
            self.max_audio_seconds,
            self.max_audio_samples,
            self.max_decoded_media_bytes,
        )

    @property
    def num_decode_workers(self) -> int:
        """Maximum number of processes that decode media."""
        return self.media_decode_workers or min(MAX_DECODE_WORKERS, os.cpu_count() or 1)

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are allowed: `enable_lora`, or its default."""
        if self.enable_lora is not None:
            return self.enable_lora
        return bool(self.default_mm_loras) or self.lora_registry is not None

    @property
    def num_seqs(self) -> int:
        """Maximum number of sequences in one step: `max_num_seqs`, or its default."""
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(DEFAULT_MAX_NUM_SEQS, self.max_num_batched_tokens or DEFAULT_MAX_NUM_SEQS)

    @property
    def num_batched_tokens(self) -> int:
        """Maximum number of tokens in one step: `max_num_batched_tokens`, or its default."""
        return self.max_num_batched_tokens or max(DEFAULT_MAX_NUM_BATCHED_TOKENS, self.num_seqs)

    @property
    def num_slots(self) -> int:
        """Number of device slots for adapters: `max_loras`, or its default."""
        if self.max_loras is not None:
            return self.max_loras
        return min(DEFAULT_MAX_LORAS, self.max_cpu_loras or DEFAULT_MAX_LORAS)

    @property
    def num_host_loras(self) -> int:
        """Number of adapters kept in host memory: `max_cpu_loras`, or its default."""
        return self.max_cpu_loras if self.max_cpu_loras is not None else 4 * self.num_slots

    @property
    def max_pinned_loras(self) -> int:
        """Maximum number of pinned adapters: one device slot stays free; with a single slot, one place on the host."""
        return (self.num_slots if self.num_slots > 1 else self.num_host_loras) - 1

    def _problem(self, name: str, allowed: str) -> str:
        return f"{name}={getattr(self, name)!r}: {allowed}"

    def _check_numbers(self) -> Iterator[str]:
        for name in POSITIVE:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                yield self._problem(name, "must be a positive integer")
        for name in POSITIVE_OR_NONE:
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                yield self._problem(name, "must be a positive integer or None")
        yield from self._check_order("max_num_batched_tokens", "max_num_seqs")
        yield from self._check_order("max_cpu_loras", "max_loras")
        if not _is_int(self.seed):
            yield self._problem("seed", "must be an integer")
        if not _is_int(self.max_logprobs) or self.max_logprobs < -1:
            yield self._problem("max_logprobs", "must be -1 (no limit) or more")
        if not isinstance(self.gpu_memory_utilization, int | float) or not 0 < self.gpu_memory_utilization <= 1:
            yield self._problem("gpu_memory_utilization", "must be above 0 and at most 1")

    def _check_choices(self) -> Iterator[str]:
        if not isinstance(self.model, str) or not self.model:
            yield self._problem("model", "must be a directory or a Hub id")
        names = (self.served_model_name,) if isinstance(self.served_model_name, str) else self.served_model_name or ()
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            yield self._problem("served_model_name", "must be one name or several different ones")
        dtype = self.dtype if isinstance(self.dtype, str) else str(self.dtype).removeprefix("torch.")
        if dtype not in ("auto", *DTYPE_NAMES):
            yield self._problem("dtype", f"must be auto, {', '.join(DTYPE_NAMES)}")
        if self.device not in ("auto", "cpu", "cuda") and not str(self.device).startswith("cuda:"):
            yield self._problem("device", "must be auto, cpu or cuda")
        if self.generation_config not in ("auto", "none"):
            yield self._problem("generation_config", "must be auto or none")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            yield self._problem("scheduling_policy", f"must be {' or '.join(SCHEDULING_POLICIES)}")

    def _check_lora(self) -> Iterator[str]:
        if self.default_mm_loras not in (None, AUTO) and not isinstance(self.default_mm_loras, Mapping):
            yield self._problem("default_mm_loras", f"must map modalities to adapter paths, or be {AUTO!r}")
        elif self.default_mm_loras and not self.uses_lora:
            yield self._problem("default_mm_loras", "needs enable_lora=True")
        if self.lora_registry is not None and not (isinstance(self.lora_registry, str) and self.lora_registry):
            yield self._problem("lora_registry", "must be a file path")
        elif self.lora_registry is not None and not self.uses_lora:
            yield self._problem("lora_registry", "needs enable_lora=True")

    def _check_order(self, larger: str, smaller: str) -> Iterator[str]:
        """Check two options against each other if both were given; the default of one follows the other."""
        values = getattr(self, larger), getattr(self, smaller)
        if _is_int(values[0]) and _is_int(values[1]) and values[0] < values[1]:
            yield self._problem(larger, f"must be at least {smaller}={values[1]}")

    def _check_media(self) -> Iterator[str]:
        for name in ("max_audio_seconds", "media_fetch_timeout", "media_decode_timeout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                yield self._problem(name, "must be a positive number of seconds")
        if not _is_int(self.media_cache_memory_bytes) or self.media_cache_memory_bytes < 0:
            yield self._problem("media_cache_memory_bytes", "must be an integer of 0 or more")
        path = self.allowed_local_media_path
        if path is not None and not (isinstance(path, str) and os.path.isdir(os.path.expanduser(path))):
            yield self._problem("allowed_local_media_path", "must be a directory")
        yield from self._check_media_hosts()
        limits = self.limit_mm_per_prompt if self.limit_mm_per_prompt is not None else {}
        if not isinstance(limits, Mapping) or any(
            not _is_int(limit) or limit < 0 or (limit > 0 and key not in MODALITIES) for key, limit in limits.items()
        ):
            yield self._problem("limit_mm_per_prompt", f"must map {' or '.join(MODALITIES)} to a count of 0 or more")
        if self.mm_processor_kwargs is not None and not isinstance(self.mm_processor_kwargs, Mapping):
            yield self._problem("mm_processor_kwargs", "must map options of the processor to values")

    def _check_media_hosts(self) -> Iterator[str]:
        for name in ("allowed_media_domains", "allowed_media_networks"):
            value = getattr(self, name)
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            if value is not None and not (is_list and all(isinstance(entry, str) for entry in value)):
                yield self._problem(name, "must be a list of strings")
                return
        for domain in self.allowed_media_domains or ():
            if not DOMAIN.fullmatch(domain):
                yield self._problem("allowed_media_domains", f"{domain!r} must be a host name, or *. and a host name")
        if self.allowed_media_networks:
            from mmlora.processors.fetch.checked_network import parse_networks

            try:
                parse_networks(self.allowed_media_networks)
            except ConfigError as error:
                yield str(error)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
