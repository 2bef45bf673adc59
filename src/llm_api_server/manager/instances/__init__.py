"""Engine processes: started, watched, measured, adopted, ended."""
