"""One request to one engine: resolve, prepare, forward, relay."""
