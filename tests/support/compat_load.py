"""What a version of transformers makes of exports; run by `compat.py` in the version's own environment.

Usage: compat_load.py CASE...; of each directory, with an export in `hf` and a prompt in `question.npz`, prints in one
line a JSON object of what differs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def differences(directory: Path, asked: dict[str, np.ndarray]) -> dict:
    model, loading = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    model, processor = model.float().eval(), AutoProcessor.from_pretrained(directory)
    inputs = {name: torch.from_numpy(asked[name]) for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
        answer = model.generate(**inputs, max_new_tokens=len(asked["answer"]), do_sample=False)

    content = [{"type": "image"}, {"type": "text", "text": str(asked["question"])}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = processor(images=Image.fromarray(asked["picture"]), text=text, return_tensors="pt")
    pixels, expected = prompt["pixel_values"].numpy(), asked["pixel_values"]
    return {
        "keys": {kind: list(map(str, names)) for kind, names in loading.items() if names},
        "logits": float(np.abs(logits[:, : asked["logits"].shape[1]] - asked["logits"]).max()),
        "answer": answer[0, inputs["input_ids"].shape[1] :].tolist() == asked["answer"].tolist(),
        "ids": prompt["input_ids"].tolist() == asked["input_ids"].tolist(),
        "pixels": float(np.abs(pixels - expected).max()) if pixels.shape == expected.shape else float("inf"),
    }


for case in map(Path, sys.argv[1:]):
    print(json.dumps(differences(case / "hf", np.load(case / "question.npz"))), flush=True)
