"""How several processes share the work of a run."""
