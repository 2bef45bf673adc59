"""HTTP/1.1 clients: pooled and asynchronous for engines and pictures, blocking for rare requests."""
