"""The same pictures with other runtimes, and with exported graphs."""
