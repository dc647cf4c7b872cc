"""Sources of training data, and how pairs become batches."""
