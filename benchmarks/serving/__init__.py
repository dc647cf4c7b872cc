"""A server under load: throughput by number of clients, latency, refusals, memory, cold start."""
