"""How a base model is made."""
