"""Record, admission, quota and usage report of the requests of a worker."""
