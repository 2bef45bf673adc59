"""Files of models: downloads and removals, for the admin API."""
