"""Calls to an engine beside the request itself."""
