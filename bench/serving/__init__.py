"""Many requests: an engine or a server under load, styles that come and go, the start of a process."""
