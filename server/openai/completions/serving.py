"""`CompletionService`: legacy completions, of one prompt or several."""

from typing import Any

from starlette.requests import Request

from mmlora.processors.media.loader import PromptMedia, parse_references
from mmlora.server.observability.request_id import response_ids
from mmlora.server.openai.completions.output import CompletionBuilder
from mmlora.server.openai.completions.protocol import CompletionRequest, TextOrTokens, parse_completion_request
from mmlora.server.openai.generation import Generation, GenerationService, name_prompt


class CompletionService(GenerationService):
    """Serves legacy completions."""

    def _parse(self, request: Request, body: bytes, caller: str) -> Generation:
        fields = parse_completion_request(body)
        name = fields.model or self._models.base_name
        response_id, request_id = response_ids(request, "cmpl-", fields.request_id)
        builder = CompletionBuilder(response_id, name, fields, self._llm.tokenizer, request_id=request_id)
        references = parse_references(
            fields.multi_modal_data or {},
            fields.multi_modal_uuids or {},
            self._llm.processor.modalities if self._llm.processor is not None else (),
            self._llm.args.limit_mm_per_prompt,
        )
        media = PromptMedia(self._llm.media, references, caller) if references else None
        options = {"mm_processor_kwargs": fields.mm_processor_kwargs, "cache_salt": fields.cache_salt}
        prompts = {}
        for index, (request_id, prompt) in enumerate(zip(builder.request_ids, fields.prompts, strict=True)):
            with name_prompt(index, len(fields.prompts)):
                prompts[request_id] = {**options, "multi_modal_data": media, **self._prompt_fields(fields, prompt)}
        params = self._llm.default_sampling_params(**fields.sampling_options())
        return Generation(fields, prompts, media, params, builder, num_prompt_copies=params.n)

    def _prompt_fields(self, fields: CompletionRequest, prompt: TextOrTokens) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt}
        if fields.add_special_tokens is False:
            return {"prompt": prompt, "prompt_token_ids": self._llm.encode(prompt, add_special_tokens=False)}
        return {"prompt": prompt}
