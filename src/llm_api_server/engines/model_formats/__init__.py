"""Formats of model files: GGUF, Hugging Face folders, chat templates, LoRA adapters."""
