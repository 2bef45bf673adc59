"""Keys and the tokens made from them. The gateway asks; nothing here does I/O."""
