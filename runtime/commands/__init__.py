"""What the commands do, one file per command; torch and the models are imported when a command runs."""
