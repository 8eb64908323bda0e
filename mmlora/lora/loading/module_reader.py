"""Tensors of a PEFT file: check their shapes and values and convert them to the `ModuleWeights` of a module."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmlora.errors import AdapterMismatch
from mmlora.lora.loading.conversions import Target
from mmlora.lora.loading.files import CONFIG_FILE
from mmlora.lora.loading.module_index import ModuleIndex, linear_shape
from mmlora.lora.loading.peft_config import PeftConfig
from mmlora.lora.loading.tensor_keys import TensorKey, group_keys
from mmlora.lora.weights import ExpertRows, LoRAWeights, ModuleWeights, TokenRows

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_Roles = dict[str, torch.Tensor]
K = TypeVar("K")
V = TypeVar("V")


class ModuleReader:
    """Converts the tensors of one adapter, module by module.

    Args:
        tensors: all tensors of its file; on the meta device, only types and shapes are checked.
        targets: where the model has the weight of each module in the file.
        index: modules of the model.
        config: of the adapter.
        dtype: of the low-rank matrices.
        max_lora_rank: largest allowed rank; unlimited by default.

    Attributes:
        max_rank: largest rank read so far.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        targets: Mapping[str, Target],
        index: ModuleIndex,
        config: PeftConfig,
        dtype: torch.dtype,
        max_lora_rank: int | None,
    ) -> None:
        self._tensors = tensors
        self._targets = targets
        self._index = index
        self._config = config
        self._dtype = dtype
        self._max_lora_rank = max_lora_rank
        self.max_rank = 0
        self._layouts: set[str] = set()  # of fused experts: old, new, square

    def read(self, module: str, keys: Sequence[TensorKey]) -> ModuleWeights:
        """Return the weights of one module.

        Args:
            module: its name in the model.
            keys: of its tensors.

        Raises:
            AdapterMismatch: a tensor is missing, has the wrong shape or values, or is not selected by the
                configuration.
        """
        own = [key for key in keys if not self._targets[key.module].parameter]
        converted = [key for key in keys if self._targets[key.module].parameter]
        weights = self._own_weights(module, own) if own else ModuleWeights()
        return self._add_converted(module, weights, converted) if converted else weights

    def _own_weights(self, module: str, keys: Sequence[TensorKey]) -> ModuleWeights:
        """Return the changes by tensors that name the module itself."""
        if len(names := {key.module for key in keys}) > 1:
            raise AdapterMismatch(f"several sets of tensors match one module: {', '.join(sorted(names))}")
        by_depth, parameters = group_keys(keys)
        name = keys[0].module
        kind = self._index.kind_of(module)
        loras: dict[str, LoRAWeights] = {}
        token_rows = None
        for depth, roles in by_depth.items():
            if "token_rows" in roles:
                token_rows = self._token_rows(name, module, roles.pop("token_rows"))
            if not roles:
                continue
            if kind == "other":
                parameter, known_as = self._nested_parameter(name, module, depth, next(iter(roles.values())))
                loras[parameter] = self._parameter_lora(module, parameter, roles, known_as)
            else:
                self._check_selected(module, self._names(name, module))
                loras["weight"] = self._lora(name, module, kind, roles)
        replaced = {
            parameter: tensor
            for parameter, key in parameters.items()
            if (tensor := self._parameter(name, module, key, self._tensors[key.key], has_lora=bool(loras))) is not None
        }
        if kind == "other":
            return ModuleWeights(None, replaced, loras, token_rows=token_rows)
        return ModuleWeights(loras.get("weight"), replaced, token_rows=token_rows)

    def _add_converted(self, module: str, weights: ModuleWeights, keys: Sequence[TensorKey]) -> ModuleWeights:
        """Add the changes by tensors of modules of transformers 4 whose weights are in parameters of this module."""
        loras, replaced = dict(weights.parameter_loras), dict(weights.parameters)
        experts: dict[ExpertRows, LoRAWeights] = {}
        replacements: dict[str, dict[Target, TensorKey]] = defaultdict(dict)
        by_name: dict[str, list[TensorKey]] = defaultdict(list)
        for key in keys:
            by_name[key.module].append(key)
        for name, named in sorted(by_name.items()):
            target = self._targets[name]
            by_depth, parameters = group_keys(named)
            for roles in by_depth.values():
                if target.expert is None:
                    _add_once(loras, target.parameter, self._converted_lora(name, target, roles), name)
                else:
                    _add_once(experts, self._rows_of(target), self._expert_lora(name, target, roles), name)
            for key in parameters.values():
                _add_once(replacements[target.parameter], target, key, name)
        for rows in experts:
            if rows.parameter in loras:
                raise AdapterMismatch(f"several sets of tensors match one weight: {module}.{rows.parameter}")
        for parameter, found in replacements.items():
            tensor = self._converted_parameter(module, parameter, found)
            if tensor is not None:
                _add_once(replaced, parameter, tensor, f"{module}.{parameter}")
        return replace(weights, parameters=replaced, parameter_loras=loras, expert_loras=experts)

    def _rows_of(self, target: Target) -> ExpertRows:
        assert target.expert is not None
        height = self._base(target.module, target.parameter).shape[1] // target.num_parts
        return ExpertRows(target.parameter, target.expert, target.part * height, (target.part + 1) * height)

    def _converted_lora(self, name: str, target: Target, roles: Mapping[str, TensorKey]) -> LoRAWeights:
        """Return the change of a parameter that was the weight of a separate module in transformers 4."""
        names: tuple[str, ...] = (f"{name}.weight", f"{target.module}.{target.parameter}")
        if not any(map(self._config.targets_parameter, names)):
            names = (name,)
            self._check_selected(name, names)
        return self._parameter_lora(target.module, target.parameter, roles, names)

    def _converted_parameter(
        self, module: str, parameter: str, keys: Mapping[Target, TensorKey]
    ) -> torch.Tensor | None:
        """Return a parameter that is replaced by the weights of modules of transformers 4; None if it is unchanged."""
        shape = self._base(module, parameter).shape
        (target, first), *_ = keys.items()
        num_weights = 1 if target.expert is None else shape[0] * target.num_parts
        if len(keys) != num_weights:
            raise AdapterMismatch(f"there are {len(keys)} weights for {parameter} of {module}; it has {num_weights}")
        ordered = sorted(keys.items(), key=lambda item: (item[0].expert or 0, item[0].part))
        tensors = [self._tensors[key.key] for _, key in ordered]
        for key, tensor in zip(keys.values(), tensors, strict=True):
            if target.expert is not None and (*tensor.shape,) != (shape[1] // target.num_parts, shape[2]):
                raise AdapterMismatch(f"tensor {key.key} is {list(tensor.shape)}; {module} has {list(shape)}")
        whole = tensors[0] if target.expert is None else torch.cat(tensors).view(shape)
        return self._parameter(first.module, module, replace(first, parameter=parameter), whole, has_lora=False)

    def _expert_lora(self, name: str, target: Target, roles: Mapping[str, TensorKey]) -> LoRAWeights:
        """Return the change of one expert's weight, which was a Linear of transformers 4."""
        self._check_selected(name, [name])
        found = self._found(name, roles)
        self._check_pair(name, roles)
        rank = self._rank(name, name)
        rows, in_features = self._rows_of(target), self._base(target.module, target.parameter).shape[2]
        self._check_linear(name, found, rank, in_features, rows.stop - rows.start)
        self._check_extras(name, "linear", found)
        if "lora_bias" in found:
            raise AdapterMismatch(f"lora_bias is not supported for {name}: the fused experts have no biases")
        return self._cast(name, found, self._config.scaling_of(name))

    def _lora(self, name: str, module: str, kind: str, roles: Mapping[str, TensorKey]) -> LoRAWeights:
        found = self._found(module, roles)
        self._check_pair(module, roles)
        names = [name, module]
        if any(self._config.targets_parameter(f"{known}.weight") for known in names):
            names = [f"{known}.weight" for known in names]
            self._transpose(module, kind, found)
        rank = self._rank(module, *names)
        if kind == "linear":
            self._check_linear(module, found, rank, *linear_shape(self._index.modules[module]))
        elif kind == "embedding":
            self._check_embedding(module, found, rank)
        else:
            self._check_convolution(module, found, rank)
        self._check_extras(module, kind, found)
        return self._cast(module, found, self._config.scaling_of(*names))

    def _transpose(self, module: str, kind: str, found: _Roles) -> None:
        """Transpose `B A`, saved in the layout of the stored weight, into the layout that the module applies.

        Conv1D and Embedding store the transpose of Linear's weight.
        """
        is_transposed = kind == "embedding" or isinstance(self._index.modules[module], Conv1D)
        if is_transposed and found["lora_A"].ndim == found["lora_B"].ndim == 2:
            found["lora_A"], found["lora_B"] = found["lora_B"].T, found["lora_A"].T

    def _found(self, module: str, roles: Mapping[str, TensorKey]) -> _Roles:
        found = {}
        for role, key in roles.items():
            tensor = self._tensors[key.key]
            if tensor.dtype not in _DTYPES:
                raise AdapterMismatch(
                    f"tensor {key.key} on {module} is {list(tensor.shape)} {tensor.dtype}; it must be a matrix of "
                    "a floating-point type of 16 to 64 bits"
                )
            found[role] = tensor
        return found

    def _check_pair(self, module: str, roles: Mapping[str, TensorKey]) -> None:
        for role, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if role not in roles:
                key = roles.get(other) or next(iter(roles.values()))
                raise AdapterMismatch(f"tensor {key.key} has no partner {role} for {module}")

    def _rank(self, module: str, *names: str) -> int:
        rank = self._config.rank_of(*names)
        if self._max_lora_rank is not None and rank > self._max_lora_rank:
            raise AdapterMismatch(f"rank {rank} of {module} exceeds max_lora_rank={self._max_lora_rank}")
        self.max_rank = max(self.max_rank, rank)
        return rank

    def _check_linear(self, module: str, found: _Roles, rank: int, in_features: int, out_features: int) -> None:
        self._expand_blocks(found, in_features, out_features, rank)
        what = f"Linear({in_features}, {out_features})"
        self._check_shapes(module, found, rank, what, (rank, in_features), (out_features, rank))

    def _check_embedding(self, module: str, found: _Roles, rank: int) -> None:
        embedding = self._index.modules[module]
        assert isinstance(embedding, nn.Embedding)
        num, width = embedding.num_embeddings, embedding.embedding_dim
        self._check_shapes(module, found, rank, f"Embedding({num}, {width})", (rank, num), (width, rank))

    def _check_convolution(self, module: str, found: _Roles, rank: int) -> None:
        base = self._index.modules[module]
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        groups, ones = int(base.groups), [1] * (weight.ndim - 2)  # type: ignore[arg-type]
        if any(step != 1 for step in base.dilation) or base.padding_mode != "zeros":  # type: ignore[union-attr]
            raise AdapterMismatch(f"{module} is a dilated or not zero-padded convolution, which PEFT does not adapt")
        shape_A = (rank, int(base.in_channels), *weight.shape[2:])  # type: ignore[arg-type]
        shape_B = (weight.shape[0], rank // groups, *ones)
        self._check_shapes(module, found, rank, f"{type(base).__name__} {list(weight.shape)}", shape_A, shape_B)

    def _check_shapes(
        self, module: str, found: _Roles, rank: int, what: str, shape_A: Sequence[int], shape_B: Sequence[int]
    ) -> None:
        lora_A, lora_B = found["lora_A"], found["lora_B"]
        if (*lora_A.shape,) == (*shape_A,) and (*lora_B.shape,) == (*shape_B,):
            return
        shapes = f"lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}"
        fits = lora_A.shape[1:] == torch.Size(shape_A[1:]) and lora_B.shape[:1] == torch.Size(shape_B[:1])
        if fits:
            raise AdapterMismatch(f"{CONFIG_FILE} says rank {rank} for {module}, but {shapes}")
        raise AdapterMismatch(f"it was made for another model: {module} is {what}, but {shapes}")

    def _check_extras(self, module: str, kind: str, found: _Roles) -> None:
        """Check that magnitudes and biases of lora_B are present exactly when the configuration says so."""
        width = found["lora_B"].shape[0]
        shape = [1, width, *[1] * (found["lora_B"].ndim - 2)] if kind == "convolution" else [width]
        wanted = {"magnitude": self._config.use_dora, "lora_bias": self._config.lora_bias and kind != "embedding"}
        options = {"magnitude": ("use_dora", shape), "lora_bias": ("lora_bias", [width])}
        for role, is_wanted in wanted.items():
            option, allowed = options[role]
            if is_wanted != (role in found):
                found_text = "there is no" if is_wanted else "there is a"
                raise AdapterMismatch(
                    f"{CONFIG_FILE} says {option}={is_wanted}, but {found_text} {role} tensor for {module}"
                )
            if role in found and list(found[role].shape) != allowed:
                raise AdapterMismatch(f"{role} of {module} is {list(found[role].shape)}; it must be {allowed}")

    def _expand_blocks(self, found: _Roles, in_features: int, out_features: int, rank: int) -> None:
        """Build a block-diagonal matrix from its blocks, which BD-LoRA saves stacked vertically."""
        shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        for role, (height, width) in shapes.items():
            blocks = found[role]
            if not self._config.use_bdlora or blocks.ndim != 2 or 0 in blocks.shape or blocks.shape[0] != height:
                continue
            num_blocks, rest = divmod(width, blocks.shape[1])
            if num_blocks > 1 and not rest and height % num_blocks == 0:
                found[role] = torch.block_diag(*blocks.chunk(num_blocks))  # type: ignore[no-untyped-call]

    def _nested_parameter(self, name: str, module: str, depth: int, key: TensorKey) -> tuple[str, tuple[str, ...]]:
        """Return the parameter of the low-rank matrices at a depth, and the names that select it.

        PEFT wraps the first parameter innermost. The weight of a router may be selected as a module: it was a Linear in
        transformers 4.
        """
        own = self._index.modules[module]._parameters
        targets = [p for p in own if any(self._config.targets_parameter(f"{n}.{p}") for n in (name, module))]
        if not targets and depth == 0 and "weight" in own and any(map(self._config.selects, (name, module))):
            return "weight", (name, module)
        if depth >= len(targets):
            kind = type(self._index.modules[module]).__name__
            raise AdapterMismatch(
                f"tensor {key.key}: {module} is a {kind}, of which target_parameters selects {len(targets)} parameters"
            )
        parameter = targets[len(targets) - 1 - depth]
        return parameter, (f"{name}.{parameter}", f"{module}.{parameter}")

    def _parameter_lora(
        self, module: str, parameter: str, roles: Mapping[str, TensorKey], names: Sequence[str]
    ) -> LoRAWeights:
        found, base = self._found(module, roles), self._base(module, parameter)
        self._check_pair(module, roles)
        rank = self._rank(module, *names)
        is_linear = base.ndim == 2 and not any(map(self._config.targets_parameter, names))  # in transformers 4
        allowed = ("lora_A", "lora_B", "magnitude") if is_linear else ("lora_A", "lora_B")
        if base.ndim not in (2, 3) or not found.keys() <= {*allowed}:
            raise AdapterMismatch(
                f"{parameter} of {module} is {list(base.shape)}; only matrices take {' and '.join(allowed)}"
            )
        num_experts = base.shape[0] if base.ndim == 3 else 1
        is_transposed = base.ndim == 3 and getattr(self._index.modules[module], "is_transposed", False)
        out_features, in_features = reversed(base.shape[-2:]) if is_transposed else base.shape[-2:]
        rows = rank * num_experts
        what = f"{parameter} {list(base.shape)}"
        if base.ndim == 3 and not is_transposed:
            self._update_layout(found, num_experts, (rows, in_features), (out_features, rows))
        self._check_shapes(module, found, rank, what, (rows, in_features), (out_features, rows))
        if is_linear:
            self._check_extras(module, "linear", found)
        return replace(self._cast(module, found, self._config.scaling_of(*names)), num_experts=num_experts)

    def _update_layout(
        self, found: _Roles, num_experts: int, shape_A: tuple[int, int], shape_B: tuple[int, int]
    ) -> None:
        """Transpose the change of experts that PEFT before 0.19 saved, which took out_features for in_features.

        The layout of square experts cannot be seen, and PEFT reads them in its new layout. So square experts next to
        experts in the old layout are refused.
        """
        shapes = tuple(found["lora_A"].shape), tuple(found["lora_B"].shape)
        old = (shape_B[::-1], shape_A[::-1])
        self._layouts.add("square" if old == (shape_A, shape_B) else "old" if shapes == old else "new")
        if {"square", "old"} <= self._layouts:
            raise AdapterMismatch(
                "some experts have the layout of PEFT before 0.19, and others are square, so that their layout cannot "
                "be seen; convert the adapter to the layout of PEFT 0.19"
            )
        if shapes == old and shapes != (shape_A, shape_B):
            by_expert = found["lora_A"].reshape(num_experts, -1, shape_B[0])  # [num_experts, r, out]
            found["lora_A"] = found["lora_B"].reshape(shape_A[1], -1, num_experts).permute(2, 1, 0).reshape(shape_A)
            found["lora_B"] = by_expert.permute(2, 1, 0).reshape(shape_B)

    def _token_rows(self, name: str, module: str, key: TensorKey) -> TokenRows:
        rows = self._found(module, {"token_rows": key})["token_rows"]
        ids = self._config.token_indices_of(module, self._index.input_embedding)
        ids = ids or self._config.token_indices_of(name, self._index.input_embedding)
        weight = self._index.parameter(module, "weight")
        is_lookup = self._index.kind_of(module) == "embedding" or module == self._index.output_layer
        if not ids or weight is None or not is_lookup:
            raise AdapterMismatch(f"tensor {key.key}: trainable_token_indices of {CONFIG_FILE} does not name {module}")
        if list(rows.shape) != [len(ids), weight.shape[1]] or len(set(ids)) != len(ids) or max(ids) >= weight.shape[0]:
            raise AdapterMismatch(
                f"tensor {key.key} is {list(rows.shape)} for {len(ids)} different tokens of "
                f"trainable_token_indices; {module} is {list(weight.shape)}"
            )
        order = torch.tensor(ids).argsort()
        return TokenRows(torch.tensor(ids)[order], self._checked(module, "rows", rows[order], weight.dtype))

    def _parameter(
        self, name: str, module: str, key: TensorKey, tensor: torch.Tensor, *, has_lora: bool
    ) -> torch.Tensor | None:
        """Return a replaced parameter; None when it equals the base model's."""
        base = self._base(module, key.parameter)
        if tensor.shape != base.shape:
            raise AdapterMismatch(f"tensor {key.key} is {list(tensor.shape)}; {module} has {list(base.shape)}")
        if tensor.is_meta:
            return None
        if base.device.type != "meta" and _is_same(tensor, base, is_lenient=key.is_from_base):
            return None
        is_bias = "bias" in key.parameter and (
            self._config.bias == "all" or (self._config.bias == "lora_only" and has_lora)
        )
        if not is_bias and (key.is_from_base or not any(map(self._config.saves, self._names(name, module)))):
            if key.is_from_base and base.device.type == "meta":
                return None
            cause = "differs from the base model" if key.is_from_base else "is not named by modules_to_save or bias"
            raise AdapterMismatch(f"tensor {key.key} {cause}")
        return self._checked(module, key.parameter, tensor, base.dtype)

    def _base(self, module: str, parameter: str) -> torch.Tensor:
        base = self._index.parameter(module, parameter)
        assert base is not None, f"{module} has no {parameter}"
        return base

    def _check_selected(self, module: str, names: Sequence[str]) -> None:
        """Refuse low-rank matrices for a module that the configuration selects by none of its names.

        A regular expression may also match the name without `model.`: Phi-4-multimodal's adapters were trained by a
        model that wraps only its decoder, but saved under the names of the whole model.
        """
        config = self._config
        is_pattern = isinstance(config.target_modules, str) and not config.exclude_modules
        selected = any(map(config.selects, names))
        selected = selected or (is_pattern and config.selects(module.removeprefix("model.")))
        if not selected and not any(config.targets_parameter(f"{known}.weight") for known in names):
            raise AdapterMismatch(
                f"{CONFIG_FILE} does not select {module}, but there are tensors for it "
                "(target_modules, exclude_modules, layers_to_transform, layers_pattern)"
            )

    def _names(self, name: str, module: str) -> list[str]:
        """Return the names that may select a module: a tied output layer is also selected by the embedding's name."""
        embedding = self._index.input_embedding
        is_twin = self._config.ensure_weight_tying and self._index.is_tied and module == self._index.output_layer
        return [name, module, *([embedding] if is_twin and embedding is not None else [])]

    def _cast(self, module: str, found: _Roles, scaling: float) -> LoRAWeights:
        if not torch.isfinite(torch.tensor(scaling, dtype=torch.float32)):
            raise AdapterMismatch(f"the scaling of {module} is {scaling:g}, which is out of range for float32")
        cast = {role: self._checked(module, role, tensor, self._dtype) for role, tensor in found.items()}
        return LoRAWeights(cast["lora_A"], cast["lora_B"], scaling, cast.get("lora_bias"), cast.get("magnitude"))

    def _checked(self, module: str, role: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        cast = tensor.to(dtype).contiguous()
        if not cast.is_meta and not torch.isfinite(cast).all():
            cause = f"overflows {dtype}" if torch.isfinite(tensor).all() else "contains NaN or infinity"
            raise AdapterMismatch(f"{role} of {module} {cause}; every value must be finite")
        return cast


def _add_once(known: dict[K, V], key: K, value: V, name: str) -> None:
    if key in known:
        raise AdapterMismatch(f"several sets of tensors match one weight: {name}")
    known[key] = value


def _is_same(tensor: torch.Tensor, base: torch.Tensor, *, is_lenient: bool) -> bool:
    """Return whether a tensor equals the base model's; if lenient, compared in the narrower of the two dtypes."""
    dtype = base.dtype
    if is_lenient:
        dtype = min((tensor.dtype, base.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(tensor.to(dtype), base.to("cpu", dtype))
