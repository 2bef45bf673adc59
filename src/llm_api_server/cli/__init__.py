"""The command `llm-api-server`: parses, calls one function, prints. `*_view.py` make the texts."""
