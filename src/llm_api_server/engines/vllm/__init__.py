"""vLLM: the adapter, its arguments, the zygote that forks engines, and the parsers of the installed version."""
