"""Plugin `lora_filesystem_resolver`: resolves an adapter `foobar` to the directory `foobar` under a root."""

from pathlib import Path

from mmlora.errors import ConfigError
from mmlora.lora.loading.files import CONFIG_FILE
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id, is_lora_name
from mmlora.plugins.limits import ResolverThreads, check_containment
from mmlora.utils.environment import read_required

ROOT_VARIABLE = "MMLORA_LORA_RESOLVER_CACHE_DIR"


class FilesystemResolver(LoRAResolver):
    """Finds adapters under a local directory.

    Args:
        root: the directory; symbolic links may not lead out of it.

    Raises:
        ConfigError: there is no such directory.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser()
        if not self._root.is_dir():
            raise ConfigError(f"{ROOT_VARIABLE}={str(root)!r}: must be a directory")
        self._threads = ResolverThreads()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the directory of an adapter; None when there is no `adapter_config.json`.

        Raises:
            AdapterError: it lies outside of the root.
            ResolverError: too many calls have not returned.
        """
        return await self._threads.run(self._find, lora_name)

    def _find(self, lora_name: str) -> LoRARequest | None:
        directory = self._root / lora_name
        if not is_lora_name(lora_name) or not (directory / CONFIG_FILE).is_file():
            return None
        check_containment(directory, self._root)
        return LoRARequest(lora_name, derive_lora_id(lora_name), str(directory.resolve()))


def register() -> None:
    """Register the resolver for the directory in `MMLORA_LORA_RESOLVER_CACHE_DIR`.

    Raises:
        ConfigError: it is not set, or not a directory.
    """
    root = read_required(ROOT_VARIABLE, "the directory that lora_filesystem_resolver searches")
    LoRAResolverRegistry.register_resolver("lora_filesystem_resolver", FilesystemResolver(root))
