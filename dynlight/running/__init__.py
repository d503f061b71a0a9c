"""From a YAML to a run."""
