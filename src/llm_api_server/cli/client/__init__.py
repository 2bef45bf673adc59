"""Commands that are clients of the HTTP API of a running server."""
