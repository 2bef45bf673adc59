"""Devices of this host: GPUs and RAM, their sizes and the memory in use."""
