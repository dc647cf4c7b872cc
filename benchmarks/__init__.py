"""Every figure that this project claims, and how it is measured."""
