"""The choices that a run is made of: one file a choice."""
