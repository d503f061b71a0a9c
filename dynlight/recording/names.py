"""Names: what loggers are told of a run, and what W&B calls it; each name has its home here."""

AXES = ("tokens", "flops")  # what is read and spent so far; series are drawn over both

# Series that one picture shows: of the run, of static, of the teacher.
BITS_PER_BYTE = ("bits_per_byte", "static_bits_per_byte", "teacher_bits_per_byte")
NATS_PER_TOKEN = ("nats_per_token", "static_nats_per_token", "teacher_nats_per_token")
WORD_PERPLEXITY = ("word_perplexity", "static_word_perplexity")
GAIN = "gain_bits_per_byte"
SEGMENT = "segment_nats_per_token"
SEGMENT_GAIN = "segment_gain_nats_per_token"

_ALL = (*BITS_PER_BYTE, GAIN, *NATS_PER_TOKEN, *WORD_PERPLEXITY, SEGMENT, SEGMENT_GAIN)
OF_TEACHER = tuple(name for name in _ALL if name.startswith("teacher_"))
SERIES = tuple(name for name in _ALL if name not in OF_TEACHER)  # without a reference, less those of static and gain

# Costs so far, each with what it begins with.
COSTS = {"update_flops": 0, "static_flops": 0, "scoring_seconds": 0.0, "learning_seconds": 0.0, "static_seconds": 0.0}
COSTS_OF_TEACHER = {"teacher_flops": 0, "teacher_seconds": 0.0}

WEIGHT = "weight/"  # of a mixture: before the name of each expert

# On W&B alone: costs, and what is added at the end.
COST = "cost/"
DOCUMENTS = "results/documents"
REPORT = "results/report"


def over(axis: str, series: str) -> str:
    """W&B's name of a series that is drawn over an axis: `by_flops/bits_per_byte`."""
    return f"by_{axis}/{series}"
