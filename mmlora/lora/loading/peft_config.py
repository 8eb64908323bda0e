"""`adapter_config.json` of PEFT: ranks, scalings and selected modules. Unsupported features are refused by name.

An unknown key is refused, because it might change the output, unless it is off or only says how the file was made.

The keys are those of `peft.LoraConfig` up to PEFT 0.21 (https://huggingface.co/docs/peft, "LoRA").
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Final, TypeVar

import regex

from mmlora.errors import AdapterMismatch
from mmlora.lora.loading.files import CONFIG_FILE, method_refusal
from mmlora.lora.loading.patterns import PLAIN, PatternTable, match
from mmlora.utils.text import is_finite_number, printable, shorten

MAX_PATTERN_CHARS: Final = 100_000

# Keys for training, provenance or initialisation, and settings of features that another key enables. `fan_in_fan_out`
# follows from the module; VeLoRA and MonteCLoRA change only gradients and noise during training.
_IRRELEVANT: Final = frozenset(
    [
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "lora_dropout",
        "merge_weights",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
    ]
)
# Features that are refused unless they are off, with the reason.
_UNSUPPORTED: Final = {
    "layer_replication": "it changes the depth of the model",
    "use_qalora": "it needs a quantized base",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it truncates the base weights",
    "megatron_config": "it belongs to Megatron models",
    "enable_lora": "it splits a fused layer in a way that PEFT no longer has",
}
_INITIALIZATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# An unknown key with this last word, such as `transformers_version` or `_name_or_path`, says how the file was made.
_PROVENANCE: Final = frozenset(
    ["version", "path", "dir", "dtype", "revision", "commit", "url", "date", "time", "timestamp", "at"]
)
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d([T ][\d:.,]+(Z|[+-][\d:]+)?)?")
_SWITCHES: Final = ("enabled", "enable")

T = TypeVar("T")


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT LoRA configuration that affects the output.

    Attributes:
        r: rank of modules without a `rank_pattern`.
        lora_alpha: numerator of the scaling of modules without an `alpha_pattern`.
        use_rslora: scale by `alpha / √r` instead of `alpha / r`.
        rank_pattern: rank by regular expression on the end of the module name; the first match is used.
        alpha_pattern: the same for alpha.
        target_modules: which modules have tensors: a regular expression, names, or None when not specified.
        exclude_modules: exceptions to it.
        layers_to_transform: layer numbers it is limited to; empty for all.
        layers_pattern: names of the module lists that these numbers index; empty for any list.
        bias: which biases of the base were trained and saved: "none", "all" or "lora_only".
        lora_bias: whether lora_B has biases.
        use_dora: whether there are DoRA magnitudes.
        use_bdlora: whether some matrices are block-diagonal, with only their blocks saved.
        modules_to_save: name suffixes of modules that are replaced as a whole.
        target_parameters: name suffixes of parameters, other than weights of layers, with low-rank changes.
        trainable_token_indices: token ids whose embeddings are replaced, by module ("": the input embedding).
        ensure_weight_tying: whether an output layer that is tied to the embedding shares its changes.
        alora_invocation_tokens: an activated LoRA applies from these tokens on.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    use_bdlora: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    alora_invocation_tokens: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PeftConfig":
        """Build the configuration from the parsed JSON object.

        Raises:
            AdapterMismatch: a key is unknown, has a value that is not supported, or has the wrong type; the message
                names the key and the value.
        """
        for reason in refusals(content):
            raise AdapterMismatch(f"{CONFIG_FILE}: {reason}")
        return cls(
            r=_rank(content.get("r", 8), "r"),
            lora_alpha=_number(content.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=_typed(content, "use_rslora", bool, False),
            rank_pattern={key: _rank(value, f"rank_pattern[{key!r}]") for key, value in _pattern(content, "rank")},
            alpha_pattern={key: _number(value, f"alpha_pattern[{key!r}]") for key, value in _pattern(content, "alpha")},
            target_modules=_names(content, "target_modules"),
            exclude_modules=_names(content, "exclude_modules"),
            layers_to_transform=_layers(content.get("layers_to_transform")),
            layers_pattern=_as_tuple(_names(content, "layers_pattern")),
            bias=_choice(content, "bias", ("none", "all", "lora_only")),
            lora_bias=_typed(content, "lora_bias", bool, False),
            use_dora=_typed(content, "use_dora", bool, False),
            use_bdlora=bool(content.get("use_bdlora")),
            modules_to_save=_listed_names(content, "modules_to_save"),
            target_parameters=_listed_names(content, "target_parameters"),
            trainable_token_indices=_token_indices(content.get("trainable_token_indices")),
            ensure_weight_tying=_typed(content, "ensure_weight_tying", bool, False),
            alora_invocation_tokens=_integers(content.get("alora_invocation_tokens") or (), "alora_invocation_tokens"),
        )

    def rank_of(self, *names: str) -> int:
        """Return the rank of a module with one or several names; the first name with a pattern decides."""
        return self._ranks.find(names, self.r)

    def scaling_of(self, *names: str) -> float:
        """Return the scaling of a module, from its alpha and rank: `alpha / r`, or `alpha / √r` with rsLoRA."""
        rank = self.rank_of(*names)
        return self._alphas.find(names, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        return PatternTable(self.alpha_pattern)

    def selects(self, name: str) -> bool:
        """Return whether PEFT adapts the module of this name under this configuration."""
        if self.exclude_modules and _is_named(self.exclude_modules, name):
            return False
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if not _is_named(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules or not self.layers_to_transform:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        # The first number after a list name is the layer; without a list name, a parent must precede the list.
        prefix = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        found = (match(rf"{prefix}{pattern}\.(\d+)\.", name, is_whole=False) for pattern in patterns)
        first = next((layer for layer in found if layer is not None), None)
        layer = first.group(first.lastindex or 1) if first is not None else ""
        return layer.isdigit() and int(layer) in self.layers_to_transform

    def saves(self, name: str) -> bool:
        """Return whether `modules_to_save` selects the module of this name or one of its parents."""
        return any(selects_parent(entry, name) for entry in self.modules_to_save)

    def targets_parameter(self, name: str) -> bool:
        """Return whether `target_parameters` selects the parameter of this name."""
        return any(name == entry or name.endswith(f".{entry}") for entry in self.target_parameters)

    def names_embedding(self, entry: str, name: str, input_embedding: str | None) -> bool:
        """Return whether an entry of `trainable_token_indices` selects the module of this name."""
        return _is_named((entry,), name) if entry else name == input_embedding

    def token_indices_of(self, name: str, input_embedding: str | None) -> tuple[int, ...] | None:
        """Return the trained token ids of the embedding of this name; None when it has none."""
        entries = self.trainable_token_indices.items()
        return next((ids for entry, ids in entries if self.names_embedding(entry, name, input_embedding)), None)

    def digest_content(self) -> dict[str, Any]:
        """Return everything except the tensors that affects the output; patterns as pairs, since order matters."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": list(self.rank_pattern.items()),
            "alpha_pattern": list(self.alpha_pattern.items()),
            "target_parameters": self.target_parameters,
            "trainable_token_indices": list(self.trainable_token_indices.items()),
            "alora_invocation_tokens": self.alora_invocation_tokens,
        }


_UNDERSTOOD: Final = frozenset(entry.name for entry in fields(PeftConfig))
_KNOWN: Final = _UNDERSTOOD | _IRRELEVANT | _UNSUPPORTED.keys() | {"peft_type", "init_lora_weights"}


def refusals(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the reasons why an adapter with this configuration cannot be applied, one per key.

    The keys of another PEFT method mean something else, so then the method is the only reason.
    """
    reason = method_refusal(content)
    if reason is not None:
        yield reason
        return
    for key, value in content.items():
        if key in _UNSUPPORTED and not _is_off(value):
            yield f"{_shown(key, value)} is not supported: {_UNSUPPORTED[key]}; allowed: null, false or empty"
        elif key == "init_lora_weights" and value and value not in _INITIALIZATIONS:
            yield (
                f"{_shown(key, value)} is not supported: this initialisation also changed the base weights, so the "
                "tensors do not fit the plain base; save with PEFT's path_initial_model_for_weight_conversion; "
                f"allowed: {', '.join(map(repr, _INITIALIZATIONS))}"
            )
        elif key not in _KNOWN and not _is_ignored(key, value):
            yield f"the key {_shown(key, value)} is unknown; it might change the output"


def selects_parent(entry: str, name: str) -> bool:
    """Return whether an entry of `modules_to_save` selects the module of this name or one of its parents."""
    atoms = name.split(".")
    return any(".".join(atoms[: count + 1]).endswith(entry) for count in range(len(atoms)))


def ignored_keys(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the unknown keys of a configuration that cannot change the output, each as `key=value`.

    These are features that are off, as a newer PEFT writes them, and notes on how the file was made.
    """
    unknown = ((key, value) for key, value in content.items() if key not in _KNOWN)
    return tuple(_shown(key, value) for key, value in unknown if _is_ignored(key, value))


def _is_ignored(key: str, value: object) -> bool:
    return _is_off(value) or _is_provenance(key, value)


def _is_off(value: object) -> bool:
    """Return whether the value of a feature says that it is not used: null, false, 0, empty, or `{"enabled": false}`.

    Any other object is a feature that is used with these settings, even if all of them are 0.
    """
    return not value or (isinstance(value, dict) and any(value.get(switch) is False for switch in _SWITCHES))


def _is_provenance(key: str, value: object) -> bool:
    """Return whether a key only says how the file was made: a version, path, date or dtype, by its name or value."""
    if isinstance(value, str):
        return key.lower().rpartition("_")[2] in _PROVENANCE or _DATE.fullmatch(value) is not None
    return is_finite_number(value) and key.lower().rpartition("_")[2] in ("time", "timestamp")


def _shown(key: str, value: object) -> str:
    return f"{printable(shorten(key, str))}={shorten(value)}"


def _is_named(selection: str | Sequence[str], name: str) -> bool:
    if isinstance(selection, str):
        return match(selection, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in selection)


def _check_pattern(pattern: str, key: str) -> str:
    """Return a pattern that is a valid regular expression, both alone and behind a parent's name.

    Args:
        pattern: the expression.
        key: of the configuration, for the error.

    Raises:
        AdapterMismatch: it is invalid or too long.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterMismatch(f"{key} has a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}")
    if PLAIN.fullmatch(pattern):
        return pattern
    try:
        for composed in (pattern, rf"(?:.*\.)?(?:{pattern})"):
            re.compile(composed)
            regex.compile(composed)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise AdapterMismatch(
            f"{key} has {shorten(pattern)}, which is not a valid regular expression: {error}"
        ) from None
    return pattern


def _wrong(key: str, value: object, allowed: str) -> AdapterMismatch:
    return AdapterMismatch(f"{CONFIG_FILE}: {key} is {value!r}; it must be {allowed}")


def _typed(content: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    value = content.get(key)
    if not value:
        return default
    if not isinstance(value, kind):
        raise _wrong(key, value, f"a {kind.__name__}")
    return value


def _rank(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, value, "an integer of at least 1")
    return value


def _number(value: object, key: str) -> float:
    if not is_finite_number(value):
        raise _wrong(key, value, "a finite number")
    return float(value)


def _pattern(content: Mapping[str, Any], kind: str) -> list[tuple[str, object]]:
    key = f"{kind}_pattern"
    items = list(_typed(content, key, dict, {}).items())
    for pattern, _ in items:
        _check_pattern(pattern, f"{CONFIG_FILE}: {key}")
    return items


def _names(content: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return _check_pattern(value, f"{CONFIG_FILE}: {key}")
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _wrong(key, value, "a string or a list of strings")


def _listed_names(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = content.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise _wrong(key, value, "a list of names")
    return tuple(value)


def _choice(content: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = content.get(key)
    if value and value not in allowed:
        raise _wrong(key, value, f"one of {', '.join(allowed)}")
    return value or allowed[0]


def _integers(value: object, key: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(
        not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in value
    ):
        raise _wrong(key, value, "a list of token ids")
    return tuple(value)


def _token_indices(value: object) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {"": value} if value else {}
    return {str(name): _integers(ids, "trainable_token_indices") for name, ids in by_module.items()}


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value or ()
    return tuple(_check_pattern(name, f"{CONFIG_FILE}: layers_pattern") for name in names if name)


def _layers(value: object) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise _wrong("layers_to_transform", value, "an integer or a list of integers")
    return tuple(layers)
