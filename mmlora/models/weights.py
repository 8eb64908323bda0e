"""The tensors in a checkpoint's files: their sizes, from the headers, and whether they are those of its model."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import get_safetensors_metadata
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from mmlora.errors import ConfigError
from mmlora.lora.loading.load import listed
from mmlora.models.layouts.base import Layout
from mmlora.utils.library_errors import LIBRARY_ERRORS
from mmlora.utils.text import printable, shorten

logger = logging.getLogger(__name__)

MODEL_WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX_FILE: Final = "model.safetensors.index.json"
COUNTER: Final = ".num_batches_tracked"  # of BatchNorm, for training; files of some libraries lack it
# Parts of names that come from the training code, and what to do about them.
WRAPPERS: Final[Mapping[str, str]] = {
    "_orig_mod": "save the module that torch.compile wraps (model._orig_mod)",
    "_fsdp_wrapped_module": "save the full state dict of the module that FSDP wraps",
    "_checkpoint_wrapped_module": "save the module that the activation checkpointing wraps",
    "base_layer": "save the model after PEFT's merge_and_unload()",
    "base_model.model": "save the model after PEFT's merge_and_unload()",
    "module": "save the module that DistributedDataParallel wraps (model.module)",
}
LONGEST_DIFFERENCE: Final = 3  # parts of a name
MAX_PARTS: Final = 64
MAX_NAME_CHARS: Final = 160
INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})  # of safetensors


@dataclass(frozen=True)
class StoredTensor:
    """The header of one tensor; `dtype` is that of safetensors (`BF16`)."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_headers(model: str, revision: str | None, path: Path) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint's weight files.

    Args:
        model: a directory or a Hub id.
        revision: on the Hub.
        path: the local directory; where it lacks the weights of a Hub id, their headers are fetched from the Hub.

    Returns:
        The tensors by name.

    Raises:
        ConfigError: files are missing or damaged.
    """
    try:
        files = _weight_files(path)
        is_remote = not Path(model).expanduser().is_dir() and not all(file.exists() for file in files)
        if not is_remote and not files[0].exists():
            raise ValueError(f"it has no {files[0].name}; weights are read from safetensors files only")
        entries = _remote_entries(model, revision) if is_remote else (entry for file in files for entry in _read(file))
        return {name: StoredTensor(dtype, tuple(shape), end - start) for name, dtype, shape, (start, end) in entries}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the weights of {str(path)!r} cannot be loaded: {error}") from None


def count_bytes(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return the size of tensors in bytes by their type in the files."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.num_bytes
    return dict(counts)


def check_weights(model: Any, tensors: Mapping[str, StoredTensor], layout: Layout | None) -> None:
    """Check that a checkpoint has every tensor of its model, and none that changes a module in another way.

    `transformers` maps the names and shapes in the files to the model as it does when it loads them. Where it would
    initialize a tensor at random, the checkpoint is refused. Tensors of modules that the model lacks are named in a
    warning, since `transformers` leaves them out.

    Args:
        model: on the meta device; its tensors are replaced by others of the same shapes.
        tensors: from `read_headers`.
        layout: of the checkpoint; only what it leaves out may be left out.

    Raises:
        ConfigError: names tensors that are missing, unknown, or of another shape.
    """
    name = layout.name if layout is not None else type(model).__name__
    _check_types(name, model, tensors)
    found = _map_tensors(model, tensors, layout)
    unknown = [key for key in found.unexpected_keys if layout is None or not layout.left_out.fullmatch(key)]
    _check_found(name, model, found, unknown)
    applied = [key for key in unknown if layout is not None or _belongs_to_module(key, model)]
    if applied:
        reason = "" if layout is not None else "; their modules have no such parameter, so the output would change"
        raise ConfigError(f"{len(applied)} tensor(s) of a {name} checkpoint are unknown: {_listed(applied)}{reason}")
    if unknown:
        reason = f"because {type(model).__name__} has no such modules"
        logger.warning("%d tensor(s) of the checkpoint are not used, %s: %s", len(unknown), reason, _listed(unknown))


def check_initialized(missing: Collection[str]) -> None:
    """Check that `transformers` has loaded every tensor; a failure means that `check_weights` differs from it.

    Args:
        missing: names of the tensors that it has initialized at random.

    Raises:
        ConfigError: names them.
    """
    if names := [name for name in missing if not name.endswith(COUNTER)]:
        raise ConfigError(f"{len(names)} tensor(s) would be random, because the files lack them: {_listed(names)}")


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silence the report of `transformers` on tensors, in place of which `check_weights` warns."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


def _check_types(name: str, model: torch.nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse integers in place of weights: `transformers` would use them without the scales of their quantization."""
    kinds = {(_last(key), value.ndim) for key, value in model.named_parameters() if value.is_floating_point()}
    integers = {key: tensor for key, tensor in tensors.items() if tensor.dtype in INTEGERS}
    # Not a mask of older libraries that is called `bias` and has four dimensions.
    quantized = [key for key, tensor in integers.items() if (_last(key), len(tensor.shape)) in kinds]
    if quantized:
        types = "/".join(sorted({tensors[key].dtype for key in quantized}))
        count = f"{len(quantized)} tensor(s) of a {name} checkpoint are quantized ({types})"
        raise ConfigError(f"{count}: {_listed(quantized)}")


def _check_found(name: str, model: Any, found: Any, unknown: Sequence[str]) -> None:
    """Check that every tensor of the model has been found, in its shape."""
    if parts := found.conversion_errors:
        reason = "parts are missing or have other shapes"
        raise ConfigError(f"{len(parts)} tensor(s) of a {name} checkpoint cannot be joined, {reason}: {_listed(parts)}")
    if missing := _untied(found.missing_keys, model.all_tied_weights_keys):
        reason = _explain(missing, unknown, model)
        raise ConfigError(f"{len(missing)} tensor(s) of a {name} checkpoint are missing: {_listed(missing)}{reason}")
    if differing := found.mismatched_keys:
        shapes = _listed(f"{key} is {[*stored]} instead of {[*wanted]}" for key, stored, wanted in differing)
        raise ConfigError(f"{len(differing)} tensor(s) of a {name} checkpoint have other shapes: {shapes}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: Iterable[str]) -> str:
    """Join the first names for a message; those of files may contain anything."""
    return listed(printable(shorten(name, str, MAX_NAME_CHARS)) for name in names)


def _map_tensors(model: Any, tensors: Mapping[str, StoredTensor], layout: Layout | None) -> Any:
    """Load tensors without content into a model on the meta device; return the `LoadStateDictInfo`."""
    meta = torch.device("meta")
    key_mapping = dict(layout.key_mapping) if layout is not None else None
    conversions: Any = get_model_conversion_mapping(model, key_mapping)
    config = LoadStateDictConfig(ignore_mismatched_sizes=True, device_map={"": meta}, weight_mapping=conversions)
    contents = {name: torch.empty(tensor.shape, device=meta) for name, tensor in tensors.items()}
    has_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        found, _ = type(model)._load_pretrained_model(model, contents, None, config)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"the weights cannot be loaded as {type(model).__name__}: {error}") from error
    finally:
        if has_progress_bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model._adjust_missing_and_unexpected_keys(found)
    return found


def _untied(missing: Collection[str], tied: Mapping[str, str]) -> list[str]:
    """Return the missing tensors, without those tied to one that is not missing."""
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, {source}).add(target)
    present = {name for group in groups.values() if not group <= set(missing) for name in group}
    return [name for name in missing if name not in present and not name.endswith(COUNTER)]


def _explain(missing: Sequence[str], unknown: Sequence[str], model: Any) -> str:
    """Return the cause of missing tensors, for a message, and what to do about it; empty if none is known."""
    for wrapper, advice in WRAPPERS.items():
        count = sum(f".{wrapper}." in f".{name}" for name in unknown)
        if count:
            return f"; {count} tensor(s) in the files have {wrapper + '.'!r} in their names: {advice}"
    output = model.get_output_embeddings()
    if output is not None and len(missing) == 1 and model.get_parameter_or_buffer(missing[0]) is output.weight:
        return (
            "; tie_word_embeddings is false: set it to true in config.json if the model shares its input and output "
            "embeddings"
        )
    if (extra := _common_difference(unknown, missing)) is not None:
        return f"; the files have {printable(extra) + '.'!r} in the names of such tensors"
    if (extra := _common_difference(missing, unknown)) is not None:
        return f"; the files lack {printable(extra) + '.'!r} in the names of such tensors"
    return f"; the files have instead: {_listed(unknown)}" if unknown else ""


def _common_difference(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """Return the part that every name in `longer` has in addition to a name in `shorter`; None if there is none."""
    wanted = set(shorter)
    counts: Counter[str] = Counter()
    for parts in (name.split(".")[:MAX_PARTS] for name in longer):
        for start in range(len(parts)):
            for end in range(start + 1, min(start + LONGEST_DIFFERENCE, len(parts)) + 1):
                if ".".join((*parts[:start], *parts[end:])) in wanted:
                    counts[".".join(parts[start:end])] += 1
    return next((part for part, count in counts.most_common(1) if count >= len(longer)), None)


def _belongs_to_module(name: str, model: torch.nn.Module) -> bool:
    """Return whether a tensor would change a module of the model: one without children, like a linear module."""
    parts = name.split(".")
    if any(name == buffer for buffer, _ in model.named_buffers()):
        return False  # not persistent: computed by the model
    module = model
    for part in parts[:-1]:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return module is not model and not any(True for _ in module.children())


def _weight_files(path: Path) -> list[Path]:
    """Return the files that transformers would read."""
    single, index = path / MODEL_WEIGHTS_FILE, path / WEIGHTS_INDEX_FILE
    if single.exists() or not index.exists():
        return [single]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{WEIGHTS_INDEX_FILE} names files outside the directory")
    return [path / name for name in names]


_Entry = tuple[str, str, Iterable[int], tuple[int, int]]  # name, type, shape, start and end in the file


def _read(file: Path) -> Iterator[_Entry]:
    with safe_open(file, "pt"):  # validates the header, also against the size of the file
        pass
    with file.open("rb") as content:
        header: dict[str, Any] = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor["dtype"], tensor["shape"], tensor["data_offsets"]


def _remote_entries(model: str, revision: str | None) -> Iterator[_Entry]:
    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except Exception as error:  # errors of huggingface_hub share no base class: HTTP, parsing, connection
        raise ValueError(f"the Hub does not provide their headers ({type(error).__name__}: {error})") from error
    for name, tensor in (entry for file in files.values() for entry in file.tensors.items()):
        yield name, tensor.dtype, tensor.shape, tensor.data_offsets
