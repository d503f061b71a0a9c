"""Whether scores are honest: an audit of any scorer, and the replay of a receipt."""
