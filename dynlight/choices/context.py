"""Context: what is scored next, and with what in view.

| context | reads again | carries over |
|---|---|---|
| `Overlapping(segment, window, prefix)` | the inputs before `start`, `window` in all | nothing |
| `TransformerXL(segment, memory)` | nothing, or to refresh the memory | keys and values of the last `memory` positions |

A new context is a subclass of `Context` (`documents/segments.py`) with `memory`, `context` and `check`.
"""

from transformers import DynamicCache, PretrainedConfig

from dynlight.documents.segments import Context
from dynlight.errors import SettingError, require, require_at_least

# RoPE variants whose frequencies depend on the length read so far: keys kept in memory would no longer fit the queries.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Where configurations say for how many positions a model was made.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
# Those whose rows of positions begin behind that of the padding token.
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_BIASED = {"bloom", "mpt"}
# Those whose recurrence begins at 0 in each forward of several tokens, whatever the cache holds (transformers 5.23).
_BEGINNING_ANEW = {"mamba", "falcon_mamba", "jamba", "zamba"}
# transformers' layers of a cache; a dummy is that of a block which uses another's keys and values, or none.
_OF_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_OF_STATES = {
    "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
    "DynamicIndexedLayer",
}  # fmt: skip


class TransformerXL(Context):
    """Each forward reads the segment alone, and sees keys and values kept from earlier forwards.

    Keys and values of the last `memory` positions are kept, detached, as the weights made them when they were last read;
    gradients reach those of the present segment only. Positions count through the document. The compute per scored
    token does not depend on `memory` except in attention. Where a model has recurrences or convolutions (Mamba-2,
    Qwen3-Next), their states are kept as well, whatever `memory` is, if it isn't 0. Source: Dai et al. 2019 (arXiv
    1901.02860), and for adaptation Krause et al. 2019 (arXiv 1904.08378).

    Args:
        segment: tokens scored (and learned from) together.
        memory: positions kept; 0 keeps none.
        sinks: of these positions, how many are left to the first tokens of the document once they would drop out. They are
            read anew, by the present weights, right before the rest. Pretrained models heed the first few tokens much,
            whatever these are, and without them read worse than with no memory at all: 4 are enough. Source: Xiao et
            al. 2024 (arXiv 2309.17453).
        refresh: after how many updates the memory is made anew: the last segments, as many as it holds, are read again by the
            present weights, each behind what was in memory before it. Null: keys and values stay as they were made. Source:
            Temp-LoRA, Wang et al. 2024 (arXiv 2401.11504).

    Raises:
        SettingError: if `segment` is under 1, `memory` under 0, `sinks` under 0 or not fewer than `memory`, or `refresh`
            under 1 or without a memory.
    """

    def __init__(self, segment: int, memory: int, sinks: int = 0, refresh: int | None = None) -> None:
        super().__init__(segment)
        require_at_least("context.memory", 0, memory)
        require_at_least("context.sinks", 0, sinks)
        if sinks and sinks >= memory:
            raise SettingError("context.sinks", f"be fewer than the {memory} positions of memory", got=sinks)
        if refresh is not None:
            require_at_least("context.refresh", 1, refresh)
            require(memory > 0, "context.refresh", "be null with context.memory 0", got=refresh)
        self._memory = memory
        self._sinks = sinks
        self._refresh = refresh

    @property
    def memory(self) -> int:
        return self._memory

    @property
    def sinks(self) -> int:
        return self._sinks

    @property
    def refresh(self) -> int | None:
        return self._refresh

    def check(self, config: PretrainedConfig) -> None:
        if (reason := _reason_against_memory(config)) is not None:
            raise refused_memory(config, reason, got="TransformerXL")
        if has_states(config) and self.memory:
            because = f" for {config.model_type}, whose states transformers changes otherwise for a single token"
            require_at_least("context.segment", 2, self.segment, because=because)
        has_state = has_states(config) and self.refresh is not None
        require(not has_state, "context.refresh", f"be null for {config.model_type}, which carries a state of all that it has read",
                got=self.refresh)  # fmt: skip
        limit = position_limit(config)
        if limit is not None and self.segment + self.memory > limit:
            raise SettingError(
                "context.memory",
                (
                    f"be at most {max(0, limit - self.segment)} beside a segment of {self.segment} (this model was made "
                    f"for {limit} positions)"
                ),
                got=self.memory,
                advice="choose a smaller memory or segment",
            )

    def __str__(self) -> str:
        sinks = f", sinks {self.sinks}" if self.sinks else ""
        refresh = f", refresh {self.refresh}" if self.refresh else ""
        return f"TransformerXL(segment {self.segment}, memory {self.memory}{sinks}{refresh})"


class Overlapping(Context):
    """Each forward reads the last `window` inputs up to the end of the segment and scores the last `segment` of them.

    Positions count from the window's start. The compute per scored token grows with `window / segment`; with
    `window = segment` this is the rolling log-likelihood of disjoint windows.

    Args:
        segment: tokens scored (and learned from) together.
        window: tokens in view: the segment and the context read again before it.
        prefix: whether every window begins with BOS (else EOS), as the first does, in the place of its first token. Models
            that have always seen it there (Gemma) need it.

    Raises:
        SettingError: if `segment` is under 1 or `window` under `segment`.
    """

    def __init__(self, segment: int, window: int, prefix: bool = False) -> None:
        super().__init__(segment)
        require_at_least("context.window", segment, window, because=f" (context.segment is {segment})")
        self.window = window
        self._prefix = prefix

    @property
    def prefixes(self) -> bool:
        return self._prefix

    def context(self, start: int, stop: int) -> int:
        return min(start, self.window - (stop - start))

    def check(self, config: PretrainedConfig) -> None:
        limit = position_limit(config)
        if limit is not None and self.window > limit:
            raise SettingError(
                "context.window",
                f"be at most {limit}, the positions this model was made for",
                got=self.window,
                advice="choose a smaller window",
            )

    def __str__(self) -> str:
        return f"Overlapping(segment {self.segment}, window {self.window}{', prefix' * self._prefix})"


def position_limit(config: PretrainedConfig) -> int | None:
    """The number of positions the model was made for, or None where its configuration names none."""
    config = config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _LIMITS)
    limit = next((limit for limit in limits if limit and limit > 0), None)
    if limit is None or config.model_type not in _POSITIONS_AFTER_PADDING:
        return limit
    return limit - (config.pad_token_id or 0) - 1


def refused_memory(config: PretrainedConfig, reason: str, got: str) -> SettingError:
    """The error where a model cannot be read with the memory of a context, `got`."""
    advice = "choose {class_path: Overlapping, init_args: {segment: …, window: …}}"
    return SettingError(
        "context.class_path", f"be Overlapping for {config.model_type}, {reason}", got=got, advice=advice
    )


def _reason_against_memory(config: PretrainedConfig) -> str | None:
    """Why keys and values of earlier segments cannot be all that a model of this configuration remembers; None: they can."""
    text = config.get_text_config(decoder=True)
    if not has_states(config) and not _has_relative_positions(text):
        return "whose positions are not rotary"
    if changing := _rope_types(text) & _LENGTH_DEPENDENT_ROPE:
        return f"whose rotary positions, of type {min(changing)}, change with the length read"
    if text.model_type in _BEGINNING_ANEW:
        return "whose recurrence transformers begins anew in each forward"
    if not has_cache(config):
        return "for which transformers has no cache"
    if getattr(text, "keep_window_size", None):
        return "whose attention chooses among the keys that it has in view"
    if getattr(text, "attention_chunk_size", None):
        return "whose attention is cut into chunks of a document, which a memory does not begin at"
    return None


def _has_relative_positions(config: PretrainedConfig) -> bool:
    """Whether positions are rotations or biases by distance (relative, without end) rather than rows of a table.

    GPT-J and CodeGen have rotations, but look them up in a table that ends.
    """
    is_biased = config.model_type in _BIASED or getattr(config, "alibi", False)
    return bool(is_biased or getattr(config, "rope_parameters", None))


def has_cache(config: PretrainedConfig) -> bool:
    """Whether transformers' cache holds all that the model remembers of a text that it has read."""
    kinds = _layers_of_cache(config)
    return bool(kinds) and kinds <= _OF_KEYS_AND_VALUES | _OF_STATES


def has_states(config: PretrainedConfig) -> bool:
    """Whether that is more than keys and values: states of convolutions and recurrences, or keys to choose among keys by."""
    return bool(_layers_of_cache(config) & _OF_STATES)


def _layers_of_cache(config: PretrainedConfig) -> set[str]:
    """The kinds of layers that transformers' cache for the model has; none where it has no cache."""
    try:
        return {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    except Exception:  # whatever transformers raises for a model that it has no cache for
        return set()


def _rope_types(config: PretrainedConfig) -> set[str]:
    # Models that mix kinds of layers (Gemma 3) nest one dictionary of rotary parameters for each kind.
    parameters = getattr(config, "rope_parameters", None) or {}
    is_nested = all(isinstance(value, dict) for value in parameters.values())
    return {kind.get("rope_type", "default") for kind in (parameters.values() if is_nested else [parameters])}
