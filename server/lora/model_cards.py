"""The entries of `/v1/models`, in OpenAI's form with vLLM's and our own additions."""

from typing import Any

Card = dict[str, Any]


def model_card(
    name: str, root: str, parent: str | None, adapter: dict[str, Any] | None, max_model_len: int, created_s: int
) -> Card:
    """Build an entry.

    Args:
        name: what clients call the model.
        root: where it came from.
        parent: the base model of an adapter; None for the base model itself.
        adapter: what is told of an adapter; None for the base model.
        max_model_len: tokens of prompt and answer.
        created_s: when the server started, in seconds since 1970.
    """
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created_s,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "mmlora",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
        "adapter": adapter,
    }
