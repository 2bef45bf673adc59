"""The ledger and the keys of the store, written and read for all workers."""
