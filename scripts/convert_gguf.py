"""Convert a GGUF model to a Hugging Face folder (safetensors), so that vLLM can load the same weights in tests.

Run with the interpreter of `.venv-vllm`: convert_gguf.py FILE.gguf FOLDER. The folder appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


def convert(source: Path, target: Path) -> None:
    """Dequantise `source` to bfloat16 and write model, tokenizer and chat template to `target`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 - after the environment is set
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    folder, file = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(gguf_file=file, dequantize=True), dtype=torch.bfloat16
    )
    # The weights are dense now; these would mark the saved folder as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.quantization_config = None
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        built = Path(scratch) / "model"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)


def main() -> None:
    """Parse two arguments and convert."""
    if len(sys.argv) != 3:
        sys.exit("usage: convert_gguf.py FILE.gguf FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
