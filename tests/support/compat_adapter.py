"""What PEFT makes of an exported adapter; run by `compat.py` in the environment of a version of transformers.

Usage: compat_adapter.py QUESTION BASE ADAPTER [BASE ADAPTER ...]; prints for each pair how far its logits are from
those of the question, and how far with the adapter off.
"""

import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

asked = np.load(sys.argv[1])
inputs = {name: torch.from_numpy(asked[name]) for name in ("input_ids", "attention_mask", "pixel_values")}
expected = asked["logits"]


@torch.no_grad()
def distance(model: torch.nn.Module) -> float:
    return float(np.abs(model(**inputs).logits[0, :, : expected.shape[1]].numpy() - expected).max())


for base, adapter in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base).float(), adapter).eval()
    adapted = distance(model)
    with model.disable_adapter():
        print(adapted, distance(model), flush=True)
