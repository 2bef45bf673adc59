"""The worker's connection to the manager, and the leases, keys and configuration that come over it."""
