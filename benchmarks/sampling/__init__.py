"""Whole sampling runs, raced."""
