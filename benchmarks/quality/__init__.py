"""The demo, its drawn data, and figures of variations."""
