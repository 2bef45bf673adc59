"""Adapters for the programs that run models."""
