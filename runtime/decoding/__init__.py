"""Numbers per step, and the one loop."""
