"""Training steps, raced; scaling over processes."""

# of each number of processes in turn, so that a slow spell hits all alike
ROUNDS = 3
