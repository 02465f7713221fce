"""A style from one picture; and how the embedded model is made."""
