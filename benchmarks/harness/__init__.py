"""How things are measured, stored and shown."""
