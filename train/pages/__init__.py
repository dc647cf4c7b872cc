"""Crawls to training data: the pictures that share a web page, as shards."""
