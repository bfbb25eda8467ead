"""Checkpoints with quantised weights: what their configuration says of it, and what their tensors stand for.

Methods write other tensors than a layer's weight, under names of their own (``qweight``, ``weight_packed``,
``scales``); which, and how they are computed with, is the engine's to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..failures import quoted

SETTINGS = "quantization_config"
"""Of ``config.json``."""
_IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers")
"""Names, by method, of the list of layers that stay as they are."""
_SHOWN = 6


@dataclass(frozen=True)
class Quantisation:
    """What a configuration says of its weights."""

    method: str
    """``compressed-tensors``, ``awq``, ``gptq``, ``fp8``, …"""
    details: tuple[str, ...] = ()
    """Its format, and bits of weights and activations, where they are said."""
    kept: tuple[str, ...] = ()
    """Layers, or patterns of their names, that it does not quantise."""

    def __str__(self) -> str:
        kept = ", ".join(self.kept[:_SHOWN]) + (", …" if len(self.kept) > _SHOWN else "")
        said = f" ({', '.join(self.details)})" if self.details else ""
        return f"quantised with {self.method}{said}, {f'but for {kept}' if kept else 'all layers'}"


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """What a ``config.json`` says of it; None: the weights are whole."""
    settings = config.get(SETTINGS)
    if not isinstance(settings, Mapping) or not settings:
        return None
    details = [settings[name] for name in ("format", "fmt", "version") if isinstance(settings.get(name), str)]
    if isinstance(bits := settings.get("bits", settings.get("w_bit")), int):
        details.append(f"W{bits}A16")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            weights, inputs = (_bits(group.get(name)) for name in ("weights", "input_activations"))
            details.append(f"W{weights or 16}A{inputs or 16}")
    kept: list[Any] = next((settings[name] for name in _IGNORED if isinstance(settings.get(name), list)), [])
    if isinstance(rules := settings.get("dynamic"), Mapping):  # of GPTQModel: a rule with a minus leaves layers out
        kept = [*kept, *(rule for rule in rules if str(rule).startswith("-:"))]
    unique = dict.fromkeys(map(quoted, details))
    method = quoted(settings.get("quant_method", "an unnamed method"))
    return Quantisation(method, tuple(unique), tuple(map(quoted, kept)))


def _bits(settings: Any) -> int | None:
    bits = settings.get("num_bits") if isinstance(settings, Mapping) else None
    return bits if isinstance(bits, int) else None


def whole_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a quantised checkpoint as if its layers were whole: a layer that has tensors beside those of the
    model counts as one that has its weight, and they count as nothing.

    Args:
        shapes: of the stored tensors, by published names.
        expected: of the model's.
    """
    quantised = {
        layer for name in shapes if name not in expected for layer in _layers(name) if f"{layer}.weight" in expected
    }
    weights = {f"{layer}.weight" for layer in quantised}
    rest = {
        name: shape
        for name, shape in shapes.items()
        if name not in weights and (name in expected or not quantised.intersection(_layers(name)))
    }
    return rest | {name: expected[name] for name in weights}


def _layers(name: str) -> Iterator[str]:
    """Every layer that a tensor of this name might belong to."""
    steps = name.split(".")
    return (".".join(steps[:count]) for count in range(1, len(steps)))
