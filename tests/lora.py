"""A LoRA adapter of random numbers for SmolLM2-135M, in PEFT's layout: rank 8, large enough to change responses."""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path

RANK = 8
_LAYERS, _HIDDEN = 30, 576
_WIDTHS = {"q_proj": 576, "v_proj": 192}


def write_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    numbers = random.Random(seed)
    entries: dict[str, object] = {}
    data = bytearray()
    for layer in range(_LAYERS):
        for module, width in _WIDTHS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (RANK, _HIDDEN)), ("lora_B", (width, RANK))):
                values = array("f", (numbers.gauss(0, 0.1) for _ in range(shape[0] * shape[1])))
                end = len(data) + len(values) * 4
                entries[f"{prefix}.{part}.weight"] = {
                    "dtype": "F32",
                    "shape": shape,
                    "data_offsets": [len(data), end],
                }
                data += values.tobytes()
    header = json.dumps(entries).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "SmolLM2-135M-Instruct",
        "r": RANK, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": list(_WIDTHS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
