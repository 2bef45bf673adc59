"""vLLM: its argument list, its zygote, what is asked of an installed version."""
