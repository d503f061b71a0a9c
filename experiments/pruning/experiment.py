"""Can most of the weights stop learning while a document is read, and what does that save?"""

from functools import partial

from experiments import variants

BY = "parameters"
figure, table, verdict = (partial(each, by=BY) for each in (variants.figure, variants.table, variants.verdict))
