"""What leaves the runtime: weights and graphs for others to run."""
