"""What loading costs: decoders, and whole samples on one processor."""
