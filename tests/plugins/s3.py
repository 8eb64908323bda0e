"""A local S3 server with adapter files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "loras"


@contextmanager
def run_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve an empty bucket `loras`, with its endpoint and credentials in the environment of this process."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def put(prefix: str, files: dict[str, bytes]) -> None:
    """Store files under a prefix of the bucket."""
    for name, content in files.items():
        boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=content)
