"""llama.cpp: the adapter, and the server that runs inside the engine process."""
