"""What a run leaves behind: folder, logs, checkpoints."""
