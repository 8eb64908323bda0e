"""Plugin `lora_hf_hub_resolver`: resolves `org/repo` and `org/repo/subfolder` in an allow-list of Hub repositories.

The operator lists repositories and may pin their revisions. Clients cannot choose a revision, because anyone can push
files to `refs/pr/…` of a repository on the Hub.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mmlora.errors import ResolverError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id, is_lora_name
from mmlora.plugins.limits import DEFAULT_MAX_BYTES, ResolverThreads, check_containment, check_size, read_max_bytes
from mmlora.utils.environment import read_required

REPOSITORIES_VARIABLE = "MMLORA_LORA_RESOLVER_HF_REPO_LIST"


class HubResolver(LoRAResolver):
    """Finds adapters on the Hugging Face Hub and downloads their two files into the Hub's cache.

    Args:
        repositories: revision by repository id; None is the main branch. Other repositories are never requested.
        max_bytes: size limit of downloaded files.
        api: Hub client.
    """

    def __init__(
        self, repositories: Mapping[str, str | None], max_bytes: int = DEFAULT_MAX_BYTES, api: HfApi | None = None
    ) -> None:
        self._repositories = dict(repositories)
        self._max_bytes = max_bytes
        self._api = api or HfApi()
        self._threads = ResolverThreads()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Download an adapter; return None when its repository is not listed or lacks the files.

        Raises:
            AdapterError: a file is too large.
            ResolverError: the Hub cannot be reached and the adapter is not in the cache, or too many calls have not
                returned.
        """
        return await self._threads.run(self._find, lora_name)

    def _find(self, lora_name: str) -> LoRARequest | None:
        parts = lora_name.split("/")
        repo_id, folders = "/".join(parts[:2]), parts[2:]
        if not is_lora_name(lora_name) or repo_id not in self._repositories:
            return None
        try:
            config = self._download(repo_id, "/".join([*folders, CONFIG_FILE]), self._repositories[repo_id])
            snapshot = config.parents[len(folders)]
            self._download(repo_id, "/".join([*folders, WEIGHTS_FILE]), snapshot.name)  # of the same commit
        except GatedRepoError as error:
            raise ResolverError(f"{repo_id} is gated, and the Hub token has no access to it") from error
        except LocalEntryNotFoundError as error:
            raise ResolverError(f"the Hub cannot be reached, and its cache does not contain {lora_name}") from error
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        check_containment(config.parent, snapshot.parents[1])  # files link to ../blobs of the repository's cache
        return LoRARequest(lora_name, derive_lora_id(lora_name), str(config.parent))

    def _download(self, repo_id: str, filename: str, revision: str | None) -> Path:
        plan = self._api.hf_hub_download(repo_id, filename, revision=revision, dry_run=True)
        if plan.file_size is None:
            raise ResolverError(f"the Hub does not report the size of {repo_id}/{filename}")
        check_size(f"{repo_id}/{filename}", plan.file_size, self._max_bytes)
        return Path(self._api.hf_hub_download(repo_id, filename, revision=revision))


def register() -> None:
    """Register the resolver for the repositories in `MMLORA_LORA_RESOLVER_HF_REPO_LIST`.

    Raises:
        ConfigError: it is not set.
    """
    listed = read_required(
        REPOSITORIES_VARIABLE, "repositories that lora_hf_hub_resolver may request, such as org/repo"
    )
    entries = [entry.strip().partition("@") for entry in listed.split(",") if entry.strip()]
    repositories = {repo_id: revision or None for repo_id, _, revision in entries}
    LoRAResolverRegistry.register_resolver("lora_hf_hub_resolver", HubResolver(repositories, read_max_bytes()))
