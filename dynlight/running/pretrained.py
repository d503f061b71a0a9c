"""Pretrained: the model a run begins with, and its tokenizer."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined] # public all the same
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_gguf_available
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dynlight.choices.context import position_limit
from dynlight.choices.parameters import merge_adapters
from dynlight.errors import SettingError

ASSETS = Path(__file__).parents[1] / "assets"
_MODEL = "a causal language model"
# What transformers raises where a model or tokenizer can't be read.
_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, HFValidationError, SafetensorError)
_TRIED = 48  # tokens by which it is found out whether a model looks ahead


class Pretrained:
    """Any causal language model of transformers, by Hub name or local folder.

    Args:
        pretrained: Hub name (`EleutherAI/pythia-160m`), folder, or `tiny-books`, the small model in this package.
        revision: branch, tag or commit on the Hub.
        gguf_file: file in it, in llama.cpp's format, whose weights (quantized ones too), configuration and tokenizer are read.
        tokenizer: Hub name or folder of the tokenizer, where it is not the model's own.
        dtype: of the weights that don't learn; learned ones are fp32.
        attention: transformers' attention implementation; `auto`: `sdpa`, or `eager` for a model that has no other.
        compile: whether forward and backward run through `torch.compile`, for documents together too; `reduce-overhead`:
            as CUDA graphs besides.
        trust_remote_code: whether code that comes with the model may run.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto",
        compile: bool | Literal["reduce-overhead"] = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.pretrained = pretrained
        self._path = _path_of(pretrained)
        self._gguf_file = gguf_file
        self._tokenizer = self._path if tokenizer is None else _path_of(tokenizer)
        self._dtype = getattr(torch, dtype)
        self._attention = None if attention == "auto" else attention
        self.compile = compile
        self._code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self._source = {"revision": revision, **self._code}
        if gguf_file is not None:
            self._source["gguf_file"] = gguf_file
        self._tokenizer_source = self._source if tokenizer is None else {"revision": revision, **self._code}

    def how_to_load(self) -> str:
        """What `from_pretrained` of transformers is given to load the model: `"x", revision="y"`."""
        settings = {name: value for name, value in self._source.items() if value not in (None, False)}
        return ", ".join([f'"{self._path}"', *(f"{name}={value!r}" for name, value in settings.items())])

    def config(self) -> PretrainedConfig:
        """The model's configuration, read without its weights.

        Raises:
            SettingError: if there is no such model, or it is no language model.
        """
        with self._refusing("pretrained"):
            config = AutoConfig.from_pretrained(self._path, **self._source)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (
            getattr(config, "auto_map", None) or {}
        ):
            raise SettingError("model.pretrained", f"be {_MODEL}", got=f"{self.pretrained} of type {config.model_type}")
        return config

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer alone.

        Raises:
            SettingError: if there is none.
        """
        with self._refusing("tokenizer"):
            return AutoTokenizer.from_pretrained(self._tokenizer, **self._tokenizer_source)

    def outline(self) -> PreTrainedModel:
        """The model without data, on torch's `meta` device: it has every weight's name, shape and type.

        Raises:
            SettingError: if there is no such model, or it cannot be made.
        """
        config = self.config()
        with self._refusing("pretrained"), torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=self._dtype,
                attn_implementation=self._attention,
                **self._code,
            )

    def load(self) -> PreTrainedModel:
        """The model with its weights; an adapter that is saved beside them is merged into them.

        Raises:
            SettingError: if a file or a weight is missing, or if a token sees those after it.
        """
        # transformers draws a bar of its own for a GGUF file, wherever stderr goes.
        with self._refusing("pretrained"), redirect_stderr(StringIO()) if self._gguf_file else nullcontext():
            model, loading = AutoModelForCausalLM.from_pretrained(
                self._path,
                dtype=self._dtype,
                attn_implementation=self._attention,
                use_safetensors=True,  # a pickle may run code
                output_loading_info=True,
                **self._source,
            )
        absent = sorted(loading["missing_keys"])
        if any("lora_" in name for name in absent):
            raise self._refused_adapter()
        if absent:
            raise SettingError(
                "model.pretrained",
                "hold every weight of the model",
                got=f"{self.pretrained} without {absent[0]}{f' and {len(absent) - 1} more' if absent[1:] else ''}",
            )
        if merge_adapters(model):
            raise self._refused_adapter()
        is_flash = self._attention == "flash_attention_2"  # which a CPU does not have
        if is_flash:
            model.set_attn_implementation("eager")
        reason = _reason_against(model)
        if is_flash:
            model.set_attn_implementation("flash_attention_2")
        if reason is not None:
            got = f"{self.pretrained} of type {model.config.model_type}, {reason}"
            raise SettingError("model.pretrained", f"be {_MODEL}", got=got)
        return model

    def _refused_adapter(self) -> SettingError:
        what = "hold no adapter but of a kind that can be merged into its weights"
        advice = "merge it yourself (merge_and_unload of peft) and save that"
        return SettingError("model.pretrained", what, got=self.pretrained, advice=advice)

    @contextmanager
    def _refusing(self, setting: str) -> Iterator[None]:
        """Keeps transformers quiet, and turns its errors into a SettingError of `model.<setting>`."""
        disable_progress_bar()
        set_verbosity_error()
        # The first call has switched off the progress bars of downloads too, which may take an hour.
        if sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            enable_progress_bars()
        is_of_gguf = self._gguf_file is not None and (setting == "pretrained" or self._tokenizer_source is self._source)
        if is_of_gguf and not is_gguf_available():
            must, got = "be read by the package gguf", f"{self._gguf_file} without it"
            raise SettingError("model.gguf_file", must, got=got, advice="pip install 'dynlight[gguf]'")
        try:
            yield
        except Exception as error:
            if not (is_of_gguf or isinstance(error, _ERRORS)):
                raise
            raise (self._refused_gguf(error) if is_of_gguf else self._refused(setting, error)) from error

    def _refused_gguf(self, error: Exception) -> SettingError:
        """Of any error: the reader of such files raises whatever comes of one that is cut short."""
        must = f"be a file in {self.pretrained}, of {_MODEL} in llama.cpp's format that transformers reads"
        advice = f"{type(error).__name__}: {_sentence(error)}"
        if _is_no_folder(self._path):
            advice = "there is no such folder"
        return SettingError("model.gguf_file", must, got=self._gguf_file or "nothing", advice=advice)

    def _refused(self, setting: str, error: Exception) -> SettingError:
        got = self.pretrained if setting == "pretrained" else self._tokenizer
        what = f"{_MODEL} (Hub name, local folder or tiny-books)"
        if setting == "tokenizer":
            what = "a tokenizer (Hub name or local folder)"
        is_about_attention = self._attention is not None and "ttention" in str(error)
        if is_about_attention and isinstance(error, ImportError):
            return SettingError("model.attention", "be installed", got=f"{self._attention}, which is not")
        if is_about_attention and "does not support" in str(error):
            must, got = f"be auto or eager for {self.pretrained}", f"{self._attention}, which it does not have"
            return SettingError("model.attention", must, got=got)
        return SettingError(f"model.{setting}", f"be {what}", got=got or "nothing", advice=_reason(got, error))


def _reason_against(model: PreTrainedModel) -> str | None:
    """Why a model cannot be evaluated at all; None: it can."""
    try:
        return "in which a token sees those after it" if _looks_ahead(model) else None
    except Exception as error:  # whatever a model raises that needs more than tokens
        reason = shorten(next(iter(str(error).splitlines()), ""), 120, placeholder=" …")
        return f"which does not read token ids alone ({type(error).__name__}: {reason})"


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a prediction has a gradient with respect to the embedding of a later token."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models change it in place

    embedding = model.get_input_embeddings()
    length = min(_TRIED, position_limit(model.config) or _TRIED)
    padding = getattr(model.config, "pad_token_id", None)  # which some models hide
    tokens = [token for token in range(min(len(embedding.weight), 2 * length)) if token != padding]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = torch.tensor([[tokens[place] for place in (order * length)[:length]]], device=model.device)
    hook = embedding.register_forward_hook(keep)
    logits = model.eval()(input_ids=inputs, use_cache=False).logits[0].float()
    hook.remove()
    for end in (1, length // 2, length - 1):
        (gradient,) = torch.autograd.grad(logits[:end].square().sum(), embedded[:1], retain_graph=True)
        if gradient.reshape(length, -1)[end:].any():  # some models have the batch's axis behind
            return True
    return False


def _reason(got: str, error: Exception) -> str:
    """Why transformers could not read the model or tokenizer `got`, in a sentence."""
    folder = Path(got)
    if _is_no_folder(got):
        return "there is no such folder"
    if isinstance(error, OSError) and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return "its weights are a pickle, which may run code; save them as safetensors"
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        return "it holds a GGUF file; name that as model.gguf_file"
    if isinstance(error, SafetensorError):
        return f"its weights cannot be read ({error})"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return "it holds an adapter alone; merge it into its model (merge_and_unload of peft) and save that"
    sentence = _sentence(error)
    return sentence if folder.is_dir() else f"it is no folder here, and: {sentence}"


def _path_of(name: str) -> str:
    """The folder of `tiny-books`, and any other name as it is."""
    return str(ASSETS / name) if name == "tiny-books" else name


def _is_no_folder(name: str) -> bool:
    """Whether a name can only be that of a folder, and there is none."""
    return name.startswith((".", "/", "~")) and not Path(name).is_dir()


def _sentence(error: Exception) -> str:
    """The first sentence of an error."""
    sentence = " ".join(re.split(r"\.\s|\n", str(error).strip())[0].split())
    return shorten(sentence.removesuffix(" from one of:"), 160, placeholder=" …").rstrip(".")
