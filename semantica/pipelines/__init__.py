"""Pictures in, variations out."""
