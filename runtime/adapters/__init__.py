"""File -> canonical adapter -> slot in the bank."""
