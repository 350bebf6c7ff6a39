"""Built-in engines, found through the same entry points as everyone's."""
