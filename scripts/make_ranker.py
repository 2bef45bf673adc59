"""Make a small ranking model from a BERT embedding model, for tests: its scores mean nothing.

Run with the interpreter of `.venv-vllm`: make_ranker.py SOURCE_FOLDER FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def make(source: Path, target: Path) -> None:
    """Save the weights of `source` with a random head of one output, from a fixed seed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 - after the environment is set
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: PLC0415

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=1)
    # The default head is so small that all scores would be nearly equal.
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def main() -> None:
    """Parse two arguments and write the folder."""
    if len(sys.argv) != 3:
        sys.exit("usage: make_ranker.py SOURCE_FOLDER FOLDER")
    make(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
