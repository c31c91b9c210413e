"""A checkpoint's description of its own quantisation, or a clear refusal.

Enters: the `config.json` of a checkpoint, and ModelOpt's `hf_quant_config.json` where there is one. Leaves: a `Scheme`,
or None where nothing is quantised. It says how activations are quantised and what the weights' formats may be; which
weights are quantised shows in the types they are stored in, since the lists of modules left out are written in the
names of whichever library wrote them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ...errors import CheckpointError, shortened
from ...spec.recipe import Format
from ..config import text_config
from ..config_fields import Fields

MODELOPT = "hf_quant_config.json"
"""ModelOpt's own description of what it has quantised."""

SUPPORTED = "ModelOpt FP8; compressed-tensors FP8, INT8 (W8A8) and INT4 (W4A16); fbgemm_fp8"
GROUP_SIZES = (32, 64, 128)
"""Inputs that share an int4 scale: what every target's kernels take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Weights that are quantised alike.

    Attributes:
        format: Format that they are stored in.
        activations: One scale a tensor, which the checkpoint holds, or one a token; of no meaning in `int4`.
        group_size: Inputs that share a scale in `int4`.
        targets: Names, patterns behind `re:`, or classes of the modules.
    """

    format: Literal["int8", "fp8", "int4"]
    activations: Literal["static", "dynamic"]
    group_size: int = 0
    targets: tuple[str, ...] = field(default=(), compare=False)

    def names(self, module: str) -> bool:
        """Whether a linear is among the targets by its name, and not only by its class."""
        return any(
            target == module or (target[:3] == "re:" and re.match(target[3:], module) is not None)
            for target in self.targets
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A checkpoint's quantisation.

    Attributes:
        method: Which library's form it has.
        groups: How its weights are quantised.
        kv_cache: How keys and values are.
        activation_bound: The largest magnitude that a token's own scale is chosen for; 0 is none.
    """

    method: Literal["modelopt", "compressed-tensors", "fbgemm_fp8"]
    groups: tuple[WeightGroup, ...]
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    activation_bound: float = 0.0

    def group(self, module: str, kind: Format) -> WeightGroup:
        """How a weight stored in a format is quantised.

        Raises:
            CheckpointError: The configuration does not say.
        """
        fitting = [group for group in self.groups if group.format == kind]
        if len(fitting) > 1:
            named = [group for group in fitting if group.names(module)]
            fitting = named or [group for group in fitting if "Linear" in group.targets] or fitting
        if not fitting:
            found = ", ".join(dict.fromkeys(group.format for group in self.groups))
            raise CheckpointError(
                f"config.json: {module!r} is stored as {kind}, quantization_config knows {found} only: "
                "restore the file that belongs to the weights"
            )
        if any(other.activations != fitting[0].activations for other in fitting):
            raise CheckpointError(
                f"config.json: quantization_config has several groups of {kind}, none of which targets {module!r}: "
                "name it in one of them"
            )
        return fitting[0]


def read_scheme(config: Mapping[str, Any], modelopt: Mapping[str, Any] | None = None) -> Scheme | None:
    """Reads what a checkpoint says.

    Args:
        config: Its parsed `config.json`.
        modelopt: Its parsed `hf_quant_config.json`, where it has one.

    Raises:
        CheckpointError: The method, or a part of it, is none that Arriero takes.
    """
    if modelopt is not None:
        return _modelopt(_Section(f"{MODELOPT}: quantization", modelopt.get("quantization")))
    _refuse_mlx(config)
    found = text_config(dict(config)).get("quantization_config")
    if found is None:
        return None
    section = _Section("config.json: quantization_config", found)
    match method := section.get("quant_method"):
        case "modelopt":
            return _modelopt(section)
        case "compressed-tensors":
            return _compressed_tensors(section)
        case "fbgemm_fp8":
            bound = Fields(section.values).positive("activation_scale_ub", 1200.0)
            group = WeightGroup(format="fp8", activations="dynamic", targets=("Linear",))
            return Scheme(method="fbgemm_fp8", groups=(group,), activation_bound=bound)
    if method is None:
        section.refuse("quant_method", "expected the name of the library that quantised the weights: restore the file")
    raise CheckpointError(
        f"config.json: the weights are quantised by {str(method)[:100]!r}; of quantised checkpoints Arriero takes "
        f"{SUPPORTED}: give one of these, or the unquantised one"
    )


def _refuse_mlx(config: Mapping[str, Any]) -> None:
    """Refuses what MLX quantised, whose configuration names no method.

    Raises:
        CheckpointError: It did.
    """
    for place in ("quantization", "quantization_config"):
        found = config.get(place)
        if isinstance(found, dict) and "quant_method" not in found and {"group_size", "bits"} <= found.keys():
            raise CheckpointError(
                f"config.json: {place} is MLX's, whose quantised weights are not taken: give the checkpoint that was "
                "converted to MLX"
            )


class _Section:
    """An object of a configuration, and where it stands."""

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} is {shortened(values, 100)}, expected an object: restore the file")
        self.values: dict[str, Any] = values

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where it is left out or null."""
        value = self.values.get(name)
        return default if value is None else value

    def part(self, name: str) -> "_Section":
        """A nested object."""
        return _Section(f"{self.where}.{name}", self.values.get(name))

    def demand(self, name: str, default: Any, expected: Sequence[Any], remedy: str) -> Any:
        """A value that must be one of some."""
        value = self.get(name, default)
        if not any(value == each and type(value) is type(each) for each in expected):
            self.refuse(name, remedy)
        return value

    def refuse(self, name: str, remedy: str) -> NoReturn:
        """Raises the error for a value that cannot be taken."""
        found = shortened(self.values.get(name), 100)
        raise CheckpointError(f"{self.where}.{name} is {found}: {remedy}")


def _modelopt(section: _Section) -> Scheme:
    """ModelOpt's FP8: a scale a weight, static activations."""
    remedy = f"of quantised checkpoints Arriero takes {SUPPORTED}"
    section.demand("quant_algo", None, ["FP8"], remedy)
    cache = section.get("kv_cache_quant_algo", section.get("kv_cache_scheme"))
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    if isinstance(cache, dict):
        kv_cache = _cache_scheme(section)
    elif cache == "FP8":
        kv_cache = "fp8"
    elif cache is not None:
        section.refuse("kv_cache_quant_algo", "Arriero takes FP8 caches, or none")
    group = WeightGroup(format="fp8", activations="static", targets=("Linear",))
    return Scheme(method="modelopt", groups=(group,), kv_cache=kv_cache)


def _compressed_tensors(section: _Section) -> Scheme:
    """The groups of a compressed-tensors configuration."""
    section.demand("quantization_status", "compressed", ["compressed"], "save the checkpoint compressed")
    if section.get("transform_config"):
        section.refuse("transform_config", "rotated checkpoints are not taken: quantise without transforms")
    if section.get("sparsity_config") and section.part("sparsity_config").get("format", "dense") != "dense":
        section.refuse("sparsity_config", "sparse checkpoints are not taken: quantise without sparsity")
    groups = section.part("config_groups")
    if not groups.values:
        section.refuse("config_groups", "expected a group at least: restore the file")
    parsed = tuple(_group(groups.part(name)) for name in groups.values)
    kv_cache: Literal["none", "int8", "fp8"] = _cache_scheme(section) if section.get("kv_cache_scheme") else "none"
    return Scheme(method="compressed-tensors", groups=parsed, kv_cache=kv_cache)


def _group(section: _Section) -> WeightGroup:
    """One group of a compressed-tensors configuration."""
    weights = section.part("weights")
    kind = _format(weights)
    if section.get("output_activations"):
        section.refuse("output_activations", "Arriero quantises inputs of products only")
    if weights.get("actorder") in ("group", "dynamic", True):
        weights.refuse("actorder", "act-order shuffles the inputs of groups: quantise with actorder weight or null")
    targets = section.get("targets", [])
    if not isinstance(targets, list) or not all(_is_target(target) for target in targets):
        section.refuse("targets", "expected a list of names, or of patterns behind re:")
    if kind == "int4":
        if section.get("input_activations"):
            section.refuse("input_activations", "Arriero takes 4-bit weights with unquantised activations (W4A16)")
        sizes = "a group size of 32, 64 or 128 is what every target takes"
        weights.demand("strategy", "group" if weights.get("group_size") else None, ["group"], sizes)
        size = weights.demand("group_size", None, GROUP_SIZES, sizes)
        return WeightGroup(format=kind, activations="dynamic", group_size=size, targets=tuple(targets))
    strategies = "Arriero takes 8-bit weights with a scale a tensor or a channel"
    weights.demand("strategy", "tensor", ["tensor", "channel"], strategies)
    if not section.get("input_activations"):
        section.refuse("input_activations", "Arriero takes 8-bit weights with 8-bit activations (W8A8)")
    inputs = section.part("input_activations")
    if _format(inputs) != kind:
        inputs.refuse("type", f"the weights are {kind}, expected the same of the activations")
    is_dynamic = inputs.demand("dynamic", False, [False, True], "Arriero takes scales known before, or one a token")
    expected = "token" if is_dynamic else "tensor"
    inputs.demand("strategy", expected, [expected], "Arriero takes one static scale a tensor, or dynamic ones a token")
    return WeightGroup(format=kind, activations="dynamic" if is_dynamic else "static", targets=tuple(targets))


def _is_target(target: Any) -> bool:
    """Whether a target is a name, or a pattern that can be matched."""
    try:
        return isinstance(target, str) and (target[:3] != "re:" or re.compile(target[3:]) is not None)
    except re.error:
        return False


def _format(section: _Section) -> Literal["int8", "fp8", "int4"]:
    """The format of quantised weights, activations or caches."""
    kinds: dict[tuple[Any, Any], Literal["int8", "fp8", "int4"]] = {
        ("float", 8): "fp8",
        ("int", 8): "int8",
        ("int", 4): "int4",
    }
    bits, kind = section.get("num_bits", 8), section.get("type", "int")
    if not isinstance(kind, str) or not isinstance(bits, int) or (kind, bits) not in kinds:
        found = f"{shortened(kind)} of {shortened(bits)} bits"
        section.refuse("num_bits", f"{found}, Arriero takes 8-bit float and 8- and 4-bit int")
    if not section.get("symmetric", True):
        section.refuse("symmetric", "zero points are not taken: quantise symmetrically")
    return kinds[kind, bits]


def _cache_scheme(section: _Section) -> Literal["int8", "fp8"]:
    """How keys and values are quantised."""
    cache = section.part("kv_cache_scheme")
    kind = _format(cache)
    if kind == "int4":
        cache.refuse("num_bits", "Arriero takes 8-bit caches")
    remedy = "Arriero takes one static scale for the keys of a layer, and one for its values"
    cache.demand("dynamic", False, [False], remedy)
    cache.demand("strategy", "tensor", ["tensor"], remedy)
    return kind
