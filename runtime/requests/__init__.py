"""A request on its way: everything it left open is decided, what it needs is held, its canvases are made."""
