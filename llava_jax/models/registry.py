"""The registered vision towers, decoder families and projectors, whose modules import JAX.

Each is one object that says everything about itself; see `towers.Tower`, `families.Family`, `projectors.ProjectorKind`.
"""

from collections.abc import Callable

from llava_jax.registry import Registry


def registers(registry: Registry) -> Callable[[type], type]:
    """A class decorator that adds an object of the class, and how its parameters are sharded."""

    def register(cls: type) -> type:
        from llava_jax.parallel.sharding import PARAMETER_AXES

        PARAMETER_AXES.extend(registry.add(cls()).parameter_axes)
        return cls

    return register


def _modules(package: str, *names: str) -> dict[str, str]:
    return {name: f"llava_jax.models.{package}.{name}" for name in names}


# By `VisionConfig.kind`, the `model_type` of transformers, and a regular expression of `LlavaConfig.projector_type`.
TOWERS = Registry("vision tower", _modules("towers", "clip", "siglip"))
FAMILIES = Registry("decoder family", _modules("families", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text"))
PROJECTORS = Registry("projector", {r"linear|mlp([1-9]\d?)x_gelu": "llava_jax.models.projectors.mlp"}, key="pattern")
