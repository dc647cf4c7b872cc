"""What builds engines from a bundle, one file a backend."""
