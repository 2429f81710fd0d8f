"""Configuration of the model, and the published models as presets."""

import dataclasses
import re
from typing import Any, ClassVar, NamedTuple

from llava_jax.cli import shown
from llava_jax.data.anyres import AnyRes, Tiling
from llava_jax.models.registry import FAMILIES, PROJECTORS, TOWERS
from llava_jax.registry import Registry

# CLIP's own statistics of its training images, RGB in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ASPECTS = ("square", "pad", "resize", "anyres")  # "square" crops
QUANTIZATIONS = (None, "int8")  # of the decoder's weights, for inference
BASE_DTYPES = ("", "int8", "nf4")  # see `models.quantized`; "" is not quantized
# The smallest and the largest value of each number below: wider than all models, and small enough to allocate.
LIMITS = {
    **dict.fromkeys(("hidden_size", "projection_dim", "rank"), (1, 2**17)),
    "intermediate_size": (1, 2**20),
    "num_layers": (1, 1000),
    **dict.fromkeys(("num_heads", "num_kv_heads"), (1, 2**12)),
    "head_dim": (2, 2**13),
    "vocab_size": (1, 2**22),
    **dict.fromkeys(("image_size", "patch_size"), (1, 2**13)),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), (1, 2**31)),
    "select_layer": (-1001, 1000),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), (0.0, 1.0)),
    **dict.fromkeys(("rope_theta", "local_rope_theta"), (1e-6, 1e15)),
    "global_every": (1, 1001),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (1e-6, 1e6)),
    "alpha": (-1e9, 1e9),
    "dropout": (0.0, 0.999),
}


def quantized(base_dtype: str) -> str:
    """The `LlavaConfig.base_dtype` of a `config.base_dtype`, which may also be a type that is not quantized."""
    return base_dtype if base_dtype in BASE_DTYPES else ""


def check_fields(config: Any) -> None:
    """Raises `ValueError` for a field of a dataclass that has another type or is not within `LIMITS`, as NaN is not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and "None" in str(field.type):
            continue
        if field.name in LIMITS:
            low, high = LIMITS[field.name]
            number = int if isinstance(low, int) else int | float
            for one in value if isinstance(value, tuple) and value and "tuple" in str(field.type) else [value]:
                if isinstance(one, bool) or not isinstance(one, number) or not low <= one <= high:
                    kind = "an integer" if isinstance(low, int) else "a number"
                    raise ValueError(f"{field.name} is {shown(value)}, not {kind} from {low} to {high}")
        elif field.type in (bool, str) and not isinstance(value, field.type):
            raise ValueError(f"{field.name} is {shown(value)}, not a {field.type.__name__}")


def check_channels(name: str, values: Any) -> None:
    """Raises `ValueError` unless these are statistics of three channels with which pixels can be normalized."""
    numbers = isinstance(values, list | tuple) and [v for v in values if isinstance(v, int | float) and abs(v) < 1e6]
    if not numbers or len(numbers) != 3 or len(values) != 3 or any(isinstance(value, bool) for value in values):
        raise ValueError(f"{name} is {shown(values)}, not three numbers")
    if name == "image_std" and min(numbers) < 1e-6:
        raise ValueError(f"{name} is {shown(values)}, of which none may be 0 or less")


REGISTER_FIRST = "a module that registers another one has to be imported first, see docs/extending.md"


def require_registered(field: str, name: Any, registry: Registry) -> None:
    """Raises `ValueError` unless something is registered under this name."""
    if not isinstance(name, str) or name not in registry:
        raise ValueError(f"{field} {registry.unknown(name)}; {REGISTER_FIRST}")


def check_projector_type(projector_type: str) -> None:
    """Raises `ValueError` unless it matches the pattern of a registered kind of projector."""
    if not any(re.fullmatch(pattern, projector_type) for pattern in PROJECTORS):
        known = ["'linear'", "'mlpNx_gelu' (as mlp2x_gelu)", *list(PROJECTORS)[1:]]
        raise ValueError(f"projector_type is {projector_type!r}, not {' or '.join(known)}; {REGISTER_FIRST}")


def require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if of < 1 or value % of:
        raise ValueError(f"{name} {value} is not a multiple of {of_name} {of}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision transformer of CLIP (Radford et al. 2021, section 2.4) and others of its kind.

    Lengths are in pixels, patches are square; the pixels of an image beyond its last full patch are not used.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"  # or "gelu", "gelu_pytorch_tanh"
    projection_dim: int = 768  # of CLIP's head, which LLaVA does not use; kept for export
    kind: str = "clip"  # or "siglip", or another of `models.towers`
    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("quick_gelu", "gelu", "gelu_pytorch_tanh")

    def __post_init__(self) -> None:
        check_fields(self)
        require_registered("kind", self.kind, TOWERS)
        if self.hidden_act not in self.ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported are {', '.join(self.ACTIVATIONS)}")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} does not fit image_size {self.image_size}")
        require_multiple("hidden_size", self.hidden_size, "num_heads", self.num_heads)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def class_token(self) -> bool:
        """Whether the first token is no patch."""
        return TOWERS[self.kind].class_token

    @property
    def num_tokens(self) -> int:
        """S: tokens of an image in the layers."""
        return self.num_patches + self.class_token

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VisionConfig":
        kind = values.get("kind", cls.kind)
        require_registered("kind", kind, TOWERS)
        return TOWERS[kind].config_class(**values)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary embeddings, for a longer context than that of pretraining."""

    kind: str  # "linear": all frequencies; "llama3": only low ones (Dubey et al. 2024, LLaMA 3.1)
    factor: float
    # "llama3" divides frequencies with at most `low_freq_factor` turns in the context of pretraining by `factor`, keeps
    # those with at least `high_freq_factor` turns, and interpolates between them.
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind is {self.kind!r}, not 'linear' or 'llama3'")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor")


class Span(NamedTuple):
    """What a layer's tokens see: itself and `window` - 1 earlier ones, or all; and how their positions are rotated."""

    window: int | None
    theta: float
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder (Touvron et al. 2023, section 2.2), and what other families have besides."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False  # of the projections to queries, keys and values, as Qwen2 has it
    sliding_window: int | None = None  # how many tokens, itself included, a token sees, as in Mistral v0.1
    family: str | None = None  # of `models.families`; None for LLaMA, Mistral and Qwen2, told by the fields above

    def __post_init__(self) -> None:
        check_fields(self)
        require_multiple("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        require_multiple("head_dim", self.head_dim, "a rotated pair,", 2)
        if self.family is not None:
            require_registered("family", self.family, FAMILIES)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Those of all layers; `span_of` says which a layer has."""
        return (Span(self.sliding_window, self.rope_theta, self.rope_scaling),)

    def span_of(self, layer: int) -> int:
        return 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextConfig":
        if (family := values.get("family")) is not None:
            require_registered("family", family, FAMILIES)
            cls = FAMILIES[family].config_class
        scaling = values.get("rope_scaling")
        return cls(**values | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters of a model, see `models.lora`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # patterns of names of linear layers, see `models.lora.is_target`
    rslora: bool = False  # s = alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False
    dropout: float = 0.0  # of an adapter's input, in training

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def scale(self) -> float:
        """s, by which A B is multiplied."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoraConfig":
        return cls(**values | {"targets": tuple(values["targets"])})


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The model, the preprocessing of its images, and their position in a turn."""

    vision: VisionConfig
    text: TextConfig
    projector_type: str = "mlp2x_gelu"  # or "linear", "mlp3x_gelu", ...
    # Index into [embeddings, layer 1, ..., layer N], as in the paper: before the last layer. The features of several
    # layers are concatenated.
    select_layer: int | tuple[int, ...] = -2
    # Without the class token; "cls_patch" keeps it. "after_first" is "patch" of a tower without a class token, whose
    # first patch is left out, as transformers' `vision_feature_select_strategy` "default" does.
    select_feature: str = "patch"
    image_aspect: str = "pad"  # how an image becomes a square: see `ASPECTS`; "anyres" makes several of it
    image_position: str = "first"  # of images in a turn, in training: see `data.conversation.place_images`
    im_start_end: bool = False  # whether images are between <im_start> and <im_end>, as in some of the first LLaVAs
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    image_resample: str = "bicubic"  # the filter with which images are resized; or "bilinear", as SigLIP2 has it
    lora: LoraConfig | None = None  # adapters that are not merged into the weights
    base_dtype: str = ""  # of the linear layers of the decoder's layers, see `BASE_DTYPES`
    anyres: AnyRes | None = None  # of `image_aspect` "anyres"

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("image_mean", "image_std"):
            check_channels(field, getattr(self, field))
        check_projector_type(self.projector_type)
        if self.select_feature not in ("patch", "cls_patch", "after_first"):
            raise ValueError(f"select_feature is {self.select_feature!r}, not 'patch', 'cls_patch' or 'after_first'")
        if self.select_feature == "cls_patch" and not self.vision.class_token:
            raise ValueError("select_feature is 'cls_patch', but the vision tower has no class token")
        if self.select_feature == "after_first" and (self.vision.class_token or self.vision.num_patches == 1):
            raise ValueError(
                "select_feature is 'after_first', but the vision tower has a class token or one patch only"
            )
        if self.image_aspect not in ASPECTS:
            raise ValueError(f"image_aspect is {self.image_aspect!r}, not one of {', '.join(map(repr, ASPECTS))}")
        if (self.image_aspect == "anyres") != (self.anyres is not None):
            raise ValueError(f"image_aspect is {self.image_aspect!r}, but anyres is {self.anyres}")
        if self.anyres and self.select_feature != "patch":
            raise ValueError(f"select_feature is {self.select_feature!r}, but the features of AnyRes form a map")
        if self.image_position not in ("random", "first", "as_is"):
            raise ValueError(f"image_position is {self.image_position!r}, not 'random', 'first' or 'as_is'")
        if self.image_resample not in ("bicubic", "bilinear"):
            raise ValueError(f"image_resample is {shown(self.image_resample)}, not 'bicubic' or 'bilinear'")
        if self.base_dtype not in BASE_DTYPES:
            raise ValueError(f"base_dtype is {shown(self.base_dtype)}, not one of {', '.join(map(repr, BASE_DTYPES))}")
        if not all(0 <= layers <= self.vision.num_layers for layers in self.selected_layers):
            raise ValueError(f"select_layer {self.select_layer} is not among {self.vision.num_layers} layers")

    @property
    def selected_layers(self) -> tuple[int, ...]:
        """The numbers of layers after which the features are taken."""
        selected = self.select_layer if isinstance(self.select_layer, tuple) else (self.select_layer,)
        return tuple(layer if layer >= 0 else self.vision.num_layers + 1 + layer for layer in selected)

    @property
    def vision_layers_used(self) -> int:
        """Number of layers up to the selected features; later ones are stored but never run."""
        return max(self.selected_layers)

    @property
    def feature_size(self) -> int:
        """The width of the features of an image, the projector's input."""
        return self.vision.hidden_size * len(self.selected_layers)

    @property
    def drops_first(self) -> bool:
        """Whether the tower's first token is left out."""
        return self.select_feature == ("patch" if self.vision.class_token else "after_first")

    @property
    def image_tokens(self) -> int:
        """P: positions of an image in the sequence or, with AnyRes, features of a tile."""
        return self.vision.num_tokens - self.drops_first

    @property
    def tiling(self) -> Tiling | None:
        """How images become tiles, with AnyRes."""
        if self.anyres is None:
            return None
        side = self.vision.image_size
        return Tiling(self.anyres, side, side // self.vision.patch_size, self.image_mean, self.image_resample)

    def to_dict(self) -> dict[str, Any]:
        """As llava.json has it. A family that the fields tell, and newer fields with their defaults, are not named, so
        that earlier versions read it."""
        values = dataclasses.asdict(self)
        if self.text.family is None:
            del values["text"]["family"]
        for field in ("lora", "base_dtype", "image_resample", "anyres"):
            if values[field] == getattr(LlavaConfig, field):
                del values[field]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LlavaConfig":
        values = dict(values)
        for key in ("image_mean", "image_std", "select_layer"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        parts = {"vision": VisionConfig.from_dict(values["vision"]), "text": TextConfig.from_dict(values["text"])}
        if values.get("lora"):
            parts["lora"] = LoraConfig.from_dict(values["lora"])
        if values.get("anyres"):
            parts["anyres"] = AnyRes.from_dict(values["anyres"])
        return cls(**values | parts)


CLIP_L_14 = VisionConfig(1024, 4096, 24, 16, image_size=224, patch_size=14)
CLIP_L_14_336 = dataclasses.replace(CLIP_L_14, image_size=336)
LLAMA_7B = TextConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-6)
LLAMA_13B = TextConfig(32000, 5120, 13824, 40, 40, 40, 128, rms_norm_eps=1e-6)
LLAMA2_7B = dataclasses.replace(LLAMA_7B, rms_norm_eps=1e-5, max_position_embeddings=4096)
LLAMA2_13B = dataclasses.replace(LLAMA_13B, rms_norm_eps=1e-5, max_position_embeddings=4096)
MISTRAL_7B = TextConfig(32000, 4096, 14336, 32, 32, 8, 128, rope_theta=1e6, max_position_embeddings=32768)

PRESETS: dict[str, LlavaConfig] = {
    # The paper: Vicuna v0 on LLaMA 1, one linear layer, 224 pixels.
    "llava-v0-7b": LlavaConfig(CLIP_L_14, LLAMA_7B, "linear", image_aspect="square"),
    "llava-v0-13b": LlavaConfig(CLIP_L_14, LLAMA_13B, "linear", image_aspect="square"),
    # LLaVA-1.5: Vicuna v1.5 on LLaMA 2, two layers, 336 pixels.
    "llava-v1.5-7b": LlavaConfig(CLIP_L_14_336, LLAMA2_7B, "mlp2x_gelu"),
    "llava-v1.5-13b": LlavaConfig(CLIP_L_14_336, LLAMA2_13B, "mlp2x_gelu"),
    # LLaVA-1.6: up to four tiles and the complete image.
    "llava-v1.6-vicuna-7b": LlavaConfig(CLIP_L_14_336, LLAMA2_7B, image_aspect="anyres", anyres=AnyRes()),
    "llava-v1.6-vicuna-13b": LlavaConfig(CLIP_L_14_336, LLAMA2_13B, image_aspect="anyres", anyres=AnyRes()),
    "llava-v1.6-mistral-7b": LlavaConfig(CLIP_L_14_336, MISTRAL_7B, image_aspect="anyres", anyres=AnyRes()),
}
