"""Pretrained: the model a run begins with, and its tokenizer."""

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ASSETS = Path(__file__).parent / "assets"


class Pretrained:
    """Any causal language model of transformers, by Hub name or local folder.

    Args:
        pretrained: Hub name (`EleutherAI/pythia-160m`), folder, or `tiny-books`, the small model in this package.
        revision: branch, tag or commit on the Hub.
        tokenizer: Hub name or folder of the tokenizer, where it is not the model's own.
        dtype: of the weights that don't learn; learned ones are fp32.
        attention: transformers' attention implementation.
        compile: whether the forward runs through `torch.compile`.
        trust_remote_code: whether code that comes with the model may run.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.pretrained = pretrained
        self._path = str(ASSETS / pretrained) if pretrained == "tiny-books" else pretrained
        self._tokenizer = tokenizer or self._path
        self._dtype = getattr(torch, dtype)
        self._attention = attention
        self._compile = compile
        self._source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    def config(self) -> PretrainedConfig:
        """The model's configuration, read without its weights.

        Raises:
            ValueError: if there is no such model, or it is no language model.
        """
        try:
            config = AutoConfig.from_pretrained(self._path, **self._source)
        except (OSError, ValueError, KeyError, HFValidationError) as error:
            raise ValueError(self._missing("pretrained", error)) from error
        if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in (
            getattr(config, "auto_map", None) or {}
        ):
            raise ValueError(
                f"model.pretrained must be a causal language model, got {self.pretrained} of type {config.model_type}"
            )
        return config

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer alone.

        Raises:
            ValueError: if there is none.
        """
        try:
            return AutoTokenizer.from_pretrained(self._tokenizer, **self._source)
        except (OSError, ValueError, KeyError, HFValidationError) as error:
            raise ValueError(self._missing("tokenizer", error)) from error

    def load(self) -> PreTrainedModel:
        """The model with its weights.

        Raises:
            ValueError: if its folder lacks a part, or a weight in it.
        """
        disable_progress_bar()
        set_verbosity_error()
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                self._path,
                dtype=self._dtype,
                attn_implementation=self._attention,
                use_safetensors=True,
                output_loading_info=True,
                **self._source,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ValueError(self._missing("pretrained", error)) from error
        if absent := sorted(loading["missing_keys"]):
            raise ValueError(
                f"model.pretrained must hold every weight of the model, got {self.pretrained} without {absent[0]}"
                f"{f' and {len(absent) - 1} more' if absent[1:] else ''}"
            )
        if self._compile:
            model.compile()
        return model

    def _missing(self, setting: str, error: Exception) -> str:
        what = {
            "pretrained": "a causal language model (Hub name, local folder or tiny-books)",
            "tokenizer": "a tokenizer (Hub name or local folder)",
        }[setting]
        got = self.pretrained if setting == "pretrained" else self._tokenizer
        if got.startswith((".", "/", "~")) and not Path(got).is_dir():
            return f"model.{setting} must be {what}, got {got}; there is no such folder"
        reason = " ".join(str(error).split())
        return f"model.{setting} must be {what}, got {got} ({reason[:200]}{'…' if reason[200:] else ''})"
