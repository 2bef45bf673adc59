"""Model files on disk: GGUF, Hugging Face folders, chat templates, LoRA adapters."""
