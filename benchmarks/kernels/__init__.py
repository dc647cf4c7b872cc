"""The operators: time, accuracy, and what the compiler makes of them."""
