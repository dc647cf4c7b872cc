"""Training: data to batches, the loop, one process or many, and what a run leaves behind."""
