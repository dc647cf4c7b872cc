"""Self-guidance (arXiv 2306.00986): a trained model steered by gradients of what its cross-attention looks at."""
