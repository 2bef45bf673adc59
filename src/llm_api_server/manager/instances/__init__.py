"""Instances: engine processes, from their start to their end."""
