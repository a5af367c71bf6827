"""Load model folders in a process that imports transformers and nothing of ours; print what came out.

Usage: python load_variant.py CLASS TOKENS.json FOLDER...; logits go to `logits.safetensors` beside each folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

kind, inputs = sys.argv[1], torch.tensor(json.loads(Path(sys.argv[2]).read_text()))
generated = []
for folder in map(Path, sys.argv[3:]):
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=inputs).logits}, folder.parent / "logits.safetensors")
    if kind == "AutoModelForCausalLM":
        out = model.generate(inputs[:, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        generated.append(out[:, 8:].tolist())
ours = sorted(name for name in sys.modules if name.split(".")[0] in {"models", "pipelines", "flows"})
print(json.dumps({"generated": generated, "ours": ours}))
