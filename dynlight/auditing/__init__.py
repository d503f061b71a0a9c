"""Whether a score is honest."""
