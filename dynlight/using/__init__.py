"""Using: what is done with what was learned."""
