"""Does it pay to learn from what surprises, to stay near the initial weights, or to read earlier segments again?"""

from functools import partial

from experiments import variants

BY = "objective"
figure, table, verdict = (partial(each, by=BY) for each in (variants.figure, variants.table, variants.verdict))
