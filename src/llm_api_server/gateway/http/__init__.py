"""The server side of HTTP; knows no model, key or usage."""
