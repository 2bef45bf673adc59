"""Tool calls that engines do not make by themselves. Pure."""
