"""From a name, a folder or a hub id to networks and their styles: complete, or an error that names what is wrong."""
