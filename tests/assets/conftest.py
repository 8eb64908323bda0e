"""A client of the bundled assistant behind the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from mmlora.async_llm import AsyncLLM
from mmlora.cli.options import parse_options
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import run_app


@pytest.fixture(scope="session")
def client() -> Iterator[OpenAI]:
    engine_args, server_args, _ = parse_options({}, {})
    llm = AsyncLLM(engine_args)
    try:
        with (
            run_app(build_app(llm, load_served_models(llm, server_args.lora_modules))) as address,
            OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client
    finally:
        llm.shutdown()
