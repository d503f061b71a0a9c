"""What a run leaves, and what it needs to go on."""
