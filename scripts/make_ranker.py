"""Makes a small ranking model from an embedding model of BERT's kind, for tests: its scores mean nothing.

Run with the interpreter of `.venv-vllm`: make_ranker.py SOURCE_FOLDER FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def make(source: Path, target: Path) -> None:
    """`source`'s weights under a random head with one output, always the same one."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 - the environment has to be set before transformers is imported
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: PLC0415

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=1)
    # Small as it is made, the head would give everything nearly the same score.
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
