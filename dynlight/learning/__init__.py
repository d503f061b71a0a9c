"""Score, commit, learn: the method, and where its learned weights live."""
