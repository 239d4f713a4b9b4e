"""HTTP serving, the client of an engine process and scale-out. Nothing of it is there yet."""
