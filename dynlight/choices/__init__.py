"""The choices that a run is made of: a file each."""
