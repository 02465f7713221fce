"""What the embedded model's pictures show."""
