"""Small random models of transformers (torch, CPU, float32) and the same parameters as our flat dict."""

import dataclasses

import numpy as np
import torch
import transformers
from transformers import LlavaForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from llava_jax.convert.names import to_ours
from llava_jax.models.config import LlavaConfig, RopeScaling, TextConfig, VisionConfig
from llava_jax.models.families import family_of, head_entries
from llava_jax.models.families.gemma3_text import Gemma3Config
from llava_jax.models.hf_names import Entry
from llava_jax.models.projectors import projector_kind
from llava_jax.models.registry import FAMILIES, TOWERS

# Few of everything, and no two widths alike where the architecture lets them differ.
VISION = VisionConfig(32, 56, num_layers=4, num_heads=4, image_size=24, patch_size=8)
TEXT = TextConfig(97, 48, 80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, rope_theta=50000.0)
LLAVA = LlavaConfig(VISION, TEXT)


# Decoders with what tells the families apart, and a tower of each kind.
TEXTS = {
    "llama": TEXT,
    "linear": dataclasses.replace(TEXT, rope_scaling=RopeScaling("linear", 4.0)),
    # So that of four frequencies the first is kept, the second is between, the others are divided.
    "llama3": dataclasses.replace(TEXT, rope_scaling=RopeScaling("llama3", 8.0, 512, 1.0, 8.0)),
    "tied": dataclasses.replace(TEXT, tie_word_embeddings=True, num_heads=3, num_kv_heads=1, head_dim=16),
    "mistral": dataclasses.replace(TEXT, sliding_window=16),
    "qwen2": dataclasses.replace(TEXT, qkv_bias=True, rms_norm_eps=1e-6),
    "phi3": dataclasses.replace(TEXT, sliding_window=16, family="phi3"),
    "qwen3": dataclasses.replace(TEXT, head_dim=12, rms_norm_eps=1e-6, family="qwen3"),
    "gemma3_text": Gemma3Config(
        **dataclasses.asdict(TEXT)
        | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 16, "family": "gemma3_text", "global_every": 2}
        | {"tie_word_embeddings": True}
    ),
}
SIGLIP = dataclasses.replace(
    VISION, image_size=30, num_heads=2, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh", kind="siglip"
)


def torch_vision_config(config: VisionConfig) -> transformers.PreTrainedConfig:
    fields = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
    }
    if config.kind == "siglip":
        return transformers.SiglipVisionConfig(**fields, vision_use_head=False)
    return transformers.CLIPVisionConfig(**fields, projection_dim=config.projection_dim)


def torch_text_config(config: TextConfig) -> transformers.PreTrainedConfig:
    scaling = config.rope_scaling
    rope = {"rope_type": "default"}
    if scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling and scaling.kind == "llama3":
        rope |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
        rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.family == "gemma3_text":
        fields |= FAMILIES["gemma3_text"].write_fields(config)
    if config.family:
        fields |= {"sliding_window": config.sliding_window, "pad_token_id": None}
        return transformers.AutoConfig.for_model(config.family, **fields)
    if config.qkv_bias:
        return transformers.Qwen2Config(**fields)
    if config.sliding_window:
        return transformers.MistralConfig(**fields, sliding_window=config.sliding_window)
    return transformers.LlamaConfig(**fields)


# `vision_feature_select_strategy` by kind of tower and our `select_feature`.
STRATEGIES = {
    ("clip", "patch"): "default",
    ("clip", "cls_patch"): "full",
    ("siglip", "patch"): "full",
    ("siglip", "after_first"): "default",
}


def torch_llava_config(config: LlavaConfig) -> transformers.LlavaConfig:
    """The last id of the vocabulary is `<image>`."""
    return transformers.LlavaConfig(
        vision_config=torch_vision_config(config.vision),
        text_config=torch_text_config(config.text),
        image_token_id=config.text.vocab_size - 1,
        vision_feature_layer=list(layers) if isinstance(layers := config.select_layer, tuple) else layers,
        vision_feature_select_strategy=STRATEGIES[config.vision.kind, config.select_feature],
        image_seq_length=config.image_tokens,
        tie_word_embeddings=config.text.tie_word_embeddings,
    )


def text_config_of(hf: transformers.PreTrainedConfig) -> TextConfig:
    """What transformers reads, as ours."""
    rope, kind, more = dict(hf.rope_parameters), TextConfig, {}
    if hf.model_type == "gemma3_text":
        kind, local = Gemma3Config, rope["sliding_attention"]
        every = 1 + hf.layer_types.index("full_attention")
        more = {"local_rope_theta": local["rope_theta"], "global_every": every}
        rope = dict(rope["full_attention"])
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    return kind(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope_theta=theta,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        rope_scaling=None if rope_type == "default" else RopeScaling(rope_type, **rope),
        qkv_bias=hf.model_type == "qwen2",
        sliding_window=getattr(hf, "sliding_window", None),
        family=hf.model_type if hf.model_type not in ("llama", "mistral", "qwen2") else None,
        **more,
    )


def vision_config_of(hf: transformers.PreTrainedConfig) -> VisionConfig:
    clip = hf.model_type == "clip_vision_model"
    return VisionConfig(
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        layer_norm_eps=hf.layer_norm_eps,
        hidden_act=hf.hidden_act,
        projection_dim=hf.projection_dim if clip else VisionConfig.projection_dim,
        kind="clip" if clip else "siglip",
    )


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter so that each one matters: signals keep their size, biases are not 0, norms not 1."""
    generator = torch.Generator().manual_seed(seed)
    gemma = [part.weight for part in module.modules() if isinstance(part, Gemma3RMSNorm)]  # which adds 1 to them
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            adds_one = any(parameter is weight for weight in gemma)
            noise = 0.3 * noise + (1.0 if name.endswith("weight") and not adds_one else 0.0)
        elif parameter.ndim > 1:
            noise /= np.sqrt(np.prod(parameter.shape[1:]))
        parameter.copy_(noise)
    return module.eval()


def clip(config: VisionConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A tower of either kind."""
    return randomize(transformers.AutoModel.from_config(torch_vision_config(config)), seed)


def llama(config: TextConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A decoder of any family."""
    return randomize(transformers.AutoModelForCausalLM.from_config(torch_text_config(config)), seed)


def llava(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    return randomize(LlavaForConditionalGeneration(torch_llava_config(config)), seed)


def params_of(module: torch.nn.Module, entries: list[Entry], prefix: str = "") -> dict[str, np.ndarray]:
    """Our parameters `entries`, from a module that holds their leaves under `prefix`."""
    tensors = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    for name in [name for name in tensors if name.endswith(("qkv_proj.weight", "gate_up_proj.weight"))]:  # Phi-3
        text = module.config.get_text_config()
        heads = [text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads]
        gated, value = name.endswith("gate_up_proj.weight"), tensors[name]
        shares, parts = ([1, 1], "gate up") if gated else (heads, "q k v")
        cuts = np.cumsum(shares)[:-1] * (len(value) // sum(shares))
        for part, rows in zip(parts.split(), np.split(value, cuts), strict=True):
            tensors[name.replace("gate_up_" if gated else "qkv_", f"{part}_")] = rows
    return {entry.name: to_ours(entry, lambda leaf: tensors[prefix + leaf]) for entry in entries}


def clip_params(module: torch.nn.Module, config: VisionConfig, prefix: str = "") -> dict[str, np.ndarray]:
    return params_of(module, TOWERS[config.kind].entries(config), prefix)


def llama_params(module: torch.nn.Module, config: TextConfig, prefix: str = "model.") -> dict[str, np.ndarray]:
    return params_of(module, family_of(config).entries(config), prefix) | params_of(module, head_entries(config))


def llava_params(module: torch.nn.Module, config: LlavaConfig) -> dict[str, np.ndarray]:
    projector = projector_kind(config.projector_type).entries(config.projector_type)
    return (
        clip_params(module, config.vision, "model.vision_tower.")
        | params_of(module, projector, "model.multi_modal_projector.")
        | llama_params(module, config.text, "model.language_model.")
    )


def part(params: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The parameters under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def num_parameters(make) -> int:
    """Parameters of the torch module that `make()` returns; none is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def train(module, groups: list[dict], batches: list[dict[str, np.ndarray]], model: LlavaConfig, config) -> list[float]:
    """The losses of torch's AdamW, which trains the parameters of `groups`, with transformers' cosine schedule."""
    module.requires_grad_(False)
    trained = [parameter.requires_grad_(True) for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-8, weight_decay=0.0)
    warmup = int(np.ceil(len(batches) * config.warmup_ratio))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    losses = []
    for batch in batches:
        value = loss(module, batch, model)
        value.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def loss(module, batch: dict[str, np.ndarray], model: LlavaConfig) -> torch.Tensor:
    """The mean loss over the target tokens of a batch with one image a row."""
    mean, std = torch.tensor(model.image_mean), torch.tensor(model.image_std)
    input_ids = torch.tensor(batch["tokens"], dtype=torch.long)
    input_ids[torch.tensor(batch["image_feature_index"]) >= 0] = module.config.image_token_id
    pixels = ((torch.tensor(batch["images"][:, 0]) / 255 - mean) / std).permute(0, 3, 1, 2)
    mask = torch.tensor(batch["segment_ids"], dtype=torch.long)
    logits = module(input_ids=input_ids, pixel_values=pixels, attention_mask=mask).logits
    labels = torch.tensor(batch["labels"], dtype=torch.long)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
