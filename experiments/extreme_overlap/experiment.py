"""At 48 new tokens in a window of 1,024, is memory's loss the same, and how much cheaper is it? (C1)"""

from experiments.context_scheme.experiment import BY, figure, pairs, table, verdict

__all__ = ["BY", "figure", "pairs", "table", "verdict"]
