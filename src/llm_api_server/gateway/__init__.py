"""The API worker: an ASGI app that authenticates, gets a lease on an engine instance and streams bytes through."""
