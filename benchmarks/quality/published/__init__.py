"""Benchmarks of others for edits and subjects, read as they are distributed: pictures made elsewhere are scored."""
