"""llama.cpp: its settings, and the server that runs inside the engine process."""
