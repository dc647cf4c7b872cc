"""Training steps, raced; scaling over processes."""
