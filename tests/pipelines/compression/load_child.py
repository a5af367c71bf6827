"""Load a model folder in a process that imports transformers and nothing of ours; print what came out.

Usage: python load_child.py FOLDER CLASS TOKENS.json; the logits go to FOLDER/../logits.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

folder, kind, tokens = Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
model = getattr(transformers, kind).from_pretrained(folder).eval()
inputs = torch.tensor(tokens)
with torch.no_grad():
    save_file({"logits": model(input_ids=inputs).logits}, folder.parent / "logits.safetensors")
generated = []
if kind == "AutoModelForCausalLM":
    out = model.generate(inputs[:, :8], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    generated = out[:, 8:].tolist()
ours = sorted(name for name in sys.modules if name.split(".")[0] in {"models", "pipelines", "flows"})
print(json.dumps({"generated": generated, "ours": ours}))
