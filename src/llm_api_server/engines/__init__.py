"""Adapters for the programs that run models. What runs inside an engine's process imports nothing of ours."""
