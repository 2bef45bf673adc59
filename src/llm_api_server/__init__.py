"""LLM API Server: one OpenAI-compatible endpoint for vLLM, llama.cpp and remote models."""

__version__ = "0.1.0"
