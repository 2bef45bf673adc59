"""Limits of keys, counted for all workers."""
