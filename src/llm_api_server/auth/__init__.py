"""Authentication: keys, tokens made from keys, and tokens of identity providers."""
