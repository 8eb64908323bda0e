"""`InputProcessor`: turns a caller's prompt into an `EngineInput`.

It renders chats, tokenizes text, decodes and processes media, expands placeholders, and chooses and loads the adapter.
It keeps no state between requests and is thread-safe; the engine thread never runs it.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmlora.config import PRIORITY, EngineArgs
from mmlora.errors import ContextLengthExceeded, MediaError, RequestError
from mmlora.inputs.adapter_policy import choose_adapter
from mmlora.inputs.chat import ChatPrompt, check_tools, read_messages
from mmlora.inputs.chat_template import ChatTemplate, Message, Tools, load_chat_template
from mmlora.inputs.engine_input import EngineInput, MediaInput
from mmlora.inputs.media_budget import MediaBudget, too_long
from mmlora.inputs.prompts import check_options, prompt_fields
from mmlora.lora.adapter import Adapter
from mmlora.lora.mix import LoRAMix, MixCache
from mmlora.lora.request import BASE, LoRARequest
from mmlora.lora.store.host_cache import HostCache
from mmlora.outputs import LoRAChoice
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.processors.media.items import MediaItem
from mmlora.processors.media.loader import (
    MediaLoader,
    PromptMedia,
    check_counts,
    check_decoded_bytes,
    why_unsupported,
)
from mmlora.processors.placeholders import PlaceholderRange, expand_placeholders
from mmlora.sampling_params import SamplingParams
from mmlora.structured_outputs import ConstraintCompiler, Matcher
from mmlora.towers.base import PromptLayout, Towers
from mmlora.towers.encoder import encoder_key
from mmlora.utils.text import describe_type, shorten

MAX_CHARS_PER_TOKEN: Final = 256  # more than the longest token of any vocabulary in use
MAX_TEMPLATES: Final = 32  # cached chat templates
Prompt = str | Sequence[int] | Mapping[str, Any] | ChatPrompt


def media_of(prompt: Prompt) -> object:
    """Return the media of a prompt as they were given, None without."""
    if isinstance(prompt, ChatPrompt):
        return prompt.media
    data = prompt.get("multi_modal_data") if isinstance(prompt, Mapping) else None
    return None if isinstance(data, Mapping) and not data else data


class InputProcessor:
    """Turns prompts into `EngineInput` objects.

    Attributes:
        media: loads the media that requests contain or reference.
        chat_template: the template of the `chat_template` option, by default the tokenizer's.

    Args:
        args: the engine's options.
        tokenizer: the model's tokenizer.
        vocab_size: number of rows of the embedding table.
        max_model_len: limit of prompt and output tokens together.
        processor, towers: media processor and towers of the model; None for a text-only model.
        host_cache: loads adapters; None without LoRA.
        defaults: by canonical key of `default_mm_loras`, the request that names the adapter and the loaded adapter.
        constraints: compiles `structured_outputs`.
    """

    def __init__(
        self,
        args: EngineArgs,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_model_len: int,
        processor: MultiModalProcessor | None,
        towers: Towers | None,
        host_cache: HostCache | None,
        defaults: Mapping[str, tuple[LoRARequest, Adapter]],
        constraints: ConstraintCompiler,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.media = MediaLoader(
            args.media_limits,
            local_path=args.allowed_local_media_path,
            domains=args.allowed_media_domains,
            networks=args.allowed_media_networks or (),
            timeout_s=args.media_fetch_timeout,
            cache_bytes=args.media_cache_memory_bytes,
            num_workers=args.num_decode_workers,
            decode_timeout_s=args.media_decode_timeout,
        )
        self.max_model_len = max_model_len
        self._args = args
        self.vocab_size = vocab_size
        self._towers = towers
        self._host_cache = host_cache
        self._defaults = defaults
        self._constraints = constraints
        self._mixes = MixCache()
        placeholders: dict[str, str] = {}
        self._placeholder_ids: frozenset[int] = frozenset()
        if processor is not None:
            placeholders = {modality: processor.placeholder_token(modality) for modality in processor.modalities}
            self._placeholder_ids = frozenset(map(processor.placeholder_token_id, processor.modalities))
        self._has_text_layout = towers is not None and towers.layout([0], ()) != PromptLayout()
        self._templates = functools.lru_cache(MAX_TEMPLATES)(functools.partial(ChatTemplate, tokenizer, placeholders))
        self.chat_template = self._templates(load_chat_template(args.chat_template))

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Tools | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
        add_special_tokens: bool = False,
        caller: str = "",
        is_strict: bool = False,
    ) -> ChatPrompt:
        """Validate a conversation; nothing is fetched, rendered or decoded yet.

        Args:
            messages, is_strict: see `read_messages`.
            chat_template: Jinja text or a file, in place of the engine's.
            chat_template_kwargs: passed to the template.
            add_generation_prompt: end with the start of an assistant message; by default unless the last message is
                continued.
            continue_final_message: leave the last message open, so that the output continues it.
            tools: OpenAI tools, passed to the template.
            mm_processor_kwargs, cache_salt: as in other prompts.
            add_special_tokens: add them to what the template renders, which usually has them.
            caller: identifies the client; media uuids are scoped to it.

        Raises:
            RequestError: a message or an option is malformed.
            MediaError: there are too many media items, or some of an unsupported modality.
            ConfigError: `chat_template` is the path of a file that does not exist.
        """
        if add_generation_prompt and continue_final_message:
            message = "add_generation_prompt and continue_final_message are mutually exclusive"
            raise RequestError(message, "continue_final_message")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        check_tools(tools or ())
        check_options(mm_processor_kwargs, cache_salt)
        turns = read_messages(messages, is_strict=is_strict)
        references = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        if references:
            modalities = self.processor.modalities if self.processor is not None else ()
            counts = Counter(reference.modality for reference in references)
            check_counts(counts, modalities, self._args.limit_mm_per_prompt)
        template = self.chat_template
        if chat_template is not None:
            template = self._templates(load_chat_template(chat_template))
        return ChatPrompt(
            turns=turns,
            media=PromptMedia(self.media, references, caller) if references else None,
            template=template,
            template_kwargs={
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                **(chat_template_kwargs or {}),
            },
            tools=tools or (),
            mm_processor_kwargs=mm_processor_kwargs,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
        )

    def render(self, chat: ChatPrompt) -> tuple[str, list[int]]:
        """Return a chat's prompt text and its tokens; placeholders are not expanded.

        Raises:
            RequestError: the template cannot render the chat, or the prompt is too long.
        """
        text, adds = chat.render(), chat.add_special_tokens
        return text, encode_text(self.tokenizer, text, self.max_model_len, "messages", add_special_tokens=adds)

    def tokenize(self, chat: ChatPrompt) -> list[int]:
        """Return the tokens of a chat as `process` does, with the placeholders of its media expanded.

        Raises:
            RequestError: the template cannot render the chat, or the prompt is too long.
            MediaError: a media item cannot be used, or the items do not match the placeholders.
        """
        _, token_ids = self.render(chat)
        if chat.media is None:
            return token_ids
        processed = self._process_media(chat.media.load(), chat.mm_processor_kwargs, token_ids, "messages")
        return self._expand(token_ids, processed)[0]

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        lora_request: LoRARequest | object | None = None,
        priority: int = 0,
    ) -> EngineInput:
        """Process one request.

        Args:
            request_id: chosen by the caller.
            prompt: text, token ids, a `ChatPrompt`, or a mapping with `prompt` or `prompt_token_ids` (which takes
                precedence), `multi_modal_data`, `mm_processor_kwargs` and `cache_salt`.
            params: sampling parameters.
            lora_request: an adapter or a mix; `BASE` for the base model; None to choose by the prompt's modalities.
            priority: lower runs earlier; must be 0 unless `scheduling_policy` is `priority`.

        Raises:
            RequestError: the prompt is malformed or too long, or the parameters do not fit the model.
            ConstraintError: `structured_outputs` cannot be compiled.
            MediaError: a media item cannot be used, or the items do not match the placeholders.
            AdapterError: the adapter cannot be loaded.
        """
        self._check_params(params)
        self._check_priority(priority)
        text: str | None
        if isinstance(prompt, ChatPrompt):
            text, token_ids = self.render(prompt)
            items = prompt.media.load() if prompt.media is not None else {}
            options, salt = prompt.mm_processor_kwargs, prompt.cache_salt
        else:
            fields = prompt_fields(prompt)
            text, token_ids = self._tokenize(fields)
            data = media_of(fields)
            items = self._load_media(data) if data is not None else {}
            options, salt = fields.get("mm_processor_kwargs"), fields.get("cache_salt")
        field = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        if params.truncate_prompt_tokens is not None:
            text, token_ids = self._truncate(text, token_ids, params)
        processed = self._process_media(items, options, token_ids, field)
        token_ids, ranges = self._expand(token_ids, processed)
        self._check_tokens(token_ids, field)
        lora_request, adapter, choice = self._choose_adapter(set(items), lora_request)
        adapter_start = 0
        if adapter is not None and adapter.invocation_tokens:
            adapter_start = _last_start(token_ids, adapter.invocation_tokens)
            if adapter_start == len(token_ids):
                choice, adapter = _not_invoked(adapter, choice), None
        media = self._place_media(processed, ranges, adapter, salt)
        num_media_tokens: Counter[str] = Counter()
        for item in processed:
            num_media_tokens[item.modality] += item.num_tokens
        room = self.max_model_len - len(token_ids)
        return EngineInput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            media=media,
            adapter=adapter,
            lora=choice,
            lora_request=lora_request,
            max_tokens=min(params.max_tokens or room, room),
            adapter_start=adapter_start,
            layout=self._lay_out(token_ids, media),
            priority=priority,
            cache_salt=salt,
            matchers=self._compile(params, text),
            bad_words=self._tokenize_bad_words(params),
            num_media_tokens=num_media_tokens,
        )

    def _tokenize(self, fields: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        text, token_ids = fields.get("prompt"), fields.get("prompt_token_ids")
        if token_ids is not None:
            return text, list(token_ids)
        assert isinstance(text, str)
        return text, self.encode(text)

    def _truncate(self, text: str | None, token_ids: list[int], params: SamplingParams) -> tuple[str | None, list[int]]:
        """Return the last `truncate_prompt_tokens` tokens of a prompt and their text, or a shorter prompt as it is."""
        limit = params.truncate_prompt_tokens or len(token_ids)
        if limit == -1:
            limit = max(1, self.max_model_len - (params.max_tokens or 1))
        if len(token_ids) <= limit:
            return text, token_ids
        kept = token_ids[-limit:]
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False), kept

    def _tokenize_bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of each bad word, and those after a space if these are as many and begin differently."""
        found: list[tuple[int, ...]] = []
        for word in params.bad_words or ():
            try:
                plain, spaced = (
                    tuple(self.tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
                    for prefix in ("", " ")
                )
            except (TypeError, ValueError) as error:  # such as a lone surrogate
                raise RequestError(f"bad_words: {shorten(word)} cannot be tokenized: {error}", "bad_words") from None
            if plain:  # some tokenizers drop invisible characters
                found.append(plain)
            if plain and len(spaced) == len(plain) and spaced[0] != plain[0]:
                found.append(spaced)
        return tuple(found)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a prompt. Numbered placeholders become the model's own; no placeholder is expanded.

        Raises:
            RequestError: the prompt is too long, or is not valid text.
            MediaError: numbered placeholders are out of order.
        """
        normalized = self.processor.normalize_placeholders(text) if self.processor is not None else text
        return encode_text(
            self.tokenizer, normalized, self.max_model_len, "prompt", add_special_tokens=add_special_tokens
        )

    def _load_media(self, data: object) -> dict[str, list[MediaItem]]:
        """Count the items of `multi_modal_data`, then decode them; `PromptMedia` has been counted already."""
        if isinstance(data, PromptMedia):
            return data.load()
        if not isinstance(data, Mapping):
            raise RequestError(f"multi_modal_data is {describe_type(data)}; it must map modalities to items")
        allowed = sorted(self.processor.modalities) if self.processor is not None else []
        contents = {str(modality): found for modality, found in data.items()}
        unknown = sorted(modality for modality in contents if modality not in allowed)
        if unknown:
            takes = f"the model takes {', '.join(allowed)}" if allowed else "the model takes text only"
            reason = why_unsupported(unknown[0])
            raise RequestError(f"multi_modal_data holds {', '.join(unknown)}; {reason or takes}")
        listed = {modality: items for modality, found in contents.items() if (items := _as_list(found))}
        counts = {modality: len(items) for modality, items in listed.items()}
        check_counts(counts, allowed, self._args.limit_mm_per_prompt)
        loaded: dict[str, list[MediaItem]] = {}
        num_bytes, budget = 0, self.media.workers.new_budget()
        for modality in sorted(listed):
            for content in listed[modality]:
                item = self.media.load(content, expected=modality, budget=budget)
                num_bytes += item.num_bytes
                check_decoded_bytes(num_bytes, self.media.limits)
                loaded.setdefault(modality, []).append(item)
        return loaded

    def _process_media(
        self, items: Mapping[str, list[MediaItem]], kwargs: Mapping[str, Any] | None, token_ids: list[int], field: str
    ) -> list[ProcessedMedia]:
        """Compute the tensors of the media of a prompt, sorted by modality, unless they are too large together."""
        if not items:
            return []
        assert self.processor is not None
        options = {**(self._args.mm_processor_kwargs or {}), **(kwargs or {})}
        num_text_tokens = sum(token not in self._placeholder_ids for token in token_ids)
        limit = self.media.limits.max_decoded_bytes
        budget = MediaBudget(num_text_tokens, self.max_model_len, limit, field)
        return budget.process([item for modality in sorted(items) for item in items[modality]], self.processor, options)

    def _expand(
        self, token_ids: list[int], processed: list[ProcessedMedia]
    ) -> tuple[list[int], list[PlaceholderRange]]:
        """Expand the placeholders of a prompt; skipped for a prompt without media and placeholders."""
        if not processed and self._placeholder_ids.isdisjoint(token_ids):
            return token_ids, []
        assert self.processor is not None
        return expand_placeholders(self.processor.arrange_tokens(token_ids, processed), processed, self.processor)

    def _place_media(
        self, processed: list[ProcessedMedia], ranges: list[PlaceholderRange], adapter: Adapter | None, salt: str | None
    ) -> tuple[MediaInput, ...]:
        media_digest = adapter.media_digest if adapter is not None else None
        modalities = {item.modality for item in processed}
        joint_modes = self._towers.joint_modes if self._towers is not None else {}
        media = []
        for place in ranges:
            item = processed[place.media_index]
            mode = item.modality if len(modalities) == 1 else joint_modes.get(item.modality, item.modality)
            key = encoder_key(item, mode, media_digest, salt)
            media.append(MediaInput(item, place.start, place.start + place.length, mode, key))
        return tuple(media)

    def _lay_out(self, token_ids: list[int], media: Sequence[MediaInput]) -> PromptLayout:
        if self._towers is None or not (media or self._has_text_layout):
            return PromptLayout()
        try:
            return self._towers.layout(token_ids, [(item.start, item.media) for item in media])
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            raise MediaError(f"the model cannot compute positions for the media of this prompt: {error}") from error

    def _choose_adapter(
        self, modalities: set[str], lora_request: LoRARequest | object | None
    ) -> tuple[LoRARequest | LoRAMix | None, Adapter | None, LoRAChoice]:
        is_base = lora_request is BASE
        if lora_request is not None and not is_base and not isinstance(lora_request, LoRARequest | LoRAMix):
            raise RequestError(f"lora_request={lora_request!r} must be a LoRARequest, a LoRAMix, mmlora.BASE or None")
        explicit = lora_request if isinstance(lora_request, LoRARequest | LoRAMix) else None
        if explicit is not None and self._host_cache is None:
            raise RequestError(f"adapter {explicit.lora_name!r} is requested, but the engine has enable_lora=False")
        requests: dict[str, LoRARequest | LoRAMix] = {key: request for key, (request, _) in self._defaults.items()}
        choice = choose_adapter(modalities, requests, explicit=explicit, is_base_explicit=is_base)
        if choice.adapter is None:
            return None, None, LoRAChoice(None, None, choice.reason, choice.warning)
        adapter = self._load(choice.adapter)
        return choice.adapter, adapter, LoRAChoice(choice.adapter.lora_name, adapter.digest, choice.reason)

    def _load(self, request: LoRARequest | LoRAMix) -> Adapter:
        if isinstance(request, LoRAMix):
            return self._mixes.get(request, [self._load(part) for part, _ in request.parts])
        for default, adapter in self._defaults.values():
            if default is request:
                return adapter
        assert self._host_cache is not None
        return self._host_cache.get(request)

    def _compile(self, params: SamplingParams, prompt: str | None) -> tuple[Matcher, ...]:
        """Return one matcher per output. Copies are made here because copying a large matcher takes 30 ms."""
        if params.structured_outputs is None:
            return ()
        start = self._constraints.compile(params.structured_outputs, prompt or "")
        return (start, *(start.copy() for _ in range(params.n - 1)))

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params is a {type(params).__name__}; it must be a SamplingParams or None")
        bound = self._args.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            number = self.vocab_size if value == -1 else value or 0
            if number > bound != -1:
                reason = f"; -1 is all {number} tokens of the vocabulary" if value == -1 else ""
                raise RequestError(f"{name}={shorten(value)} exceeds max_logprobs={bound}{reason}", name)
        if (params.truncate_prompt_tokens or 0) > self.max_model_len:
            received = f"truncate_prompt_tokens={shorten(params.truncate_prompt_tokens)}"
            raise RequestError(f"{received} exceeds max_model_len={self.max_model_len}", "truncate_prompt_tokens")
        for name in ("logit_bias", "stop_token_ids", "kept_special_token_ids", "allowed_token_ids"):
            outside = [token for token in getattr(params, name) or () if token >= self.vocab_size]
            if outside:
                message = f"token id {shorten(outside[0])} is outside the vocabulary of {self.vocab_size}"
                raise RequestError(f"{name}: {message}", name)

    def _check_priority(self, priority: int) -> None:
        if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**63) <= priority < 2**63:
            raise RequestError(f"priority={shorten(priority)} must be an integer of 64 bits", "priority")
        if priority != 0 and self._args.scheduling_policy != PRIORITY:
            raise RequestError(
                f"priority={priority} needs scheduling_policy={PRIORITY!r}; the engine has "
                f"{self._args.scheduling_policy!r}, which allows only 0",
                "priority",
            )

    def _check_tokens(self, token_ids: list[int], field: str) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; at least one token is needed", field)
        if len(token_ids) >= self.max_model_len:
            raise too_long(f"{len(token_ids)} tokens", self.max_model_len, field)
        for token in token_ids:
            if not isinstance(token, int) or not (0 <= token < self.vocab_size or token in self._placeholder_ids):
                message = f"token id {shorten(token)} is outside the vocabulary of {self.vocab_size}"
                raise RequestError(message, field)


def _last_start(token_ids: list[int], wanted: tuple[int, ...]) -> int:
    """Return where `wanted` last occurs in `token_ids`, or `len(token_ids)`."""
    starts = range(len(token_ids) - len(wanted), -1, -1)
    return next((start for start in starts if tuple(token_ids[start : start + len(wanted)]) == wanted), len(token_ids))


def _not_invoked(adapter: Adapter, choice: LoRAChoice) -> LoRAChoice:
    warning = (
        f"adapter {adapter.name!r} was not applied: the prompt lacks the tokens {list(adapter.invocation_tokens)} that "
        "invoke it"
    )
    return LoRAChoice(None, None, choice.reason, warning)


def _as_list(contents: object) -> list[object]:
    """Return one item or a list of items as a list; an `(array, rate)` tuple is one item."""
    if contents is None:
        return []
    return contents if isinstance(contents, list) else [contents]


def encode_text(
    tokenizer: Any, text: str, max_model_len: int, field: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Tokenize a prompt, unless it has so many characters that its tokens cannot fit; errors name `field`.

    Raises:
        ContextLengthExceeded: the prompt is too long.
        RequestError: it is not valid text (for example a lone surrogate).
    """
    if len(text) > max_model_len * MAX_CHARS_PER_TOKEN:
        raise ContextLengthExceeded(
            f"the prompt is too long: it has {len(text)} characters, which cannot fit into "
            f"max_model_len={max_model_len}; this model's maximum context length is {max_model_len} tokens",
            field,
        )
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the prompt cannot be tokenized: {error}", field) from None
