"""The paper's claims, measured: one folder a question. `python -m experiments` lists them."""
