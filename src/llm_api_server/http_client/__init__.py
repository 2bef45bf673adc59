"""HTTP/1.1 to engines: unix sockets, TCP and TLS, pooled connections."""
