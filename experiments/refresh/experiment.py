"""Is a memory worth making anew by the weights as they are, at what cost?"""

from functools import partial

from experiments import variants

BY = "context.refresh"
figure, table, verdict = (partial(each, by=BY) for each in (variants.figure, variants.table, variants.verdict))
