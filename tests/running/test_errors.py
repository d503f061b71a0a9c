"""A configuration that cannot be run is refused in one line that names the setting, before anything is written."""

import json
import re
import shutil
from functools import partial

import datasets
import pytest
import torch
import yaml
from folders import configuration, save_documents, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from dynlight import fit
from dynlight.running.messages import one_line
from dynlight.running.pretrained import Pretrained

GONE = object()


def at(setting, value):
    return {setting: value}


def overlapping(segment, window):
    return {"context": {"class_path": "Overlapping", "init_args": {"segment": segment, "window": window}}}


def update(name, **arguments):
    return {"update": {"class_path": name, "init_args": arguments}}


def rms(**statistics):
    return update("RMSDynamic", lr=0.1, statistics=statistics)


def parameters(name, **arguments):
    return {"parameters": {"class_path": name, "init_args": arguments}}


def hooked(hook):
    hook = f"torch.distributed.algorithms.ddp_comm_hooks.{hook}"
    return {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": hook}}


PARTS = {"trainer.strategy": "model_parallel", "trainer.devices": 2}


def model(name):
    return {"model.pretrained": f"LIBRARY/{name}"}


def read(path, files, **settings):
    return {"data": {"path": path, "data_files": f"LIBRARY/{files}"} | settings}


# What to change in a configuration that runs (setting → value), and the whole message; `...` stands for any text.
KNOWN_BEFORE_LOADING = {
    # Settings that don't exist
    "section": (at("contxt", {"a": 1}), "contxt is not a setting; did you mean context?"),
    "in model": (at("model.dtyp", "float32"), "model.dtyp is not a setting; did you mean model.dtype?"),
    "in data": (at("data.colum", "x"), "data.colum is not a setting; did you mean data.text_column?"),
    "in context": (
        at("context.init_args.segmnt", 3),
        "context.segmnt is not a setting of TransformerXL; did you mean context.segment?",
    ),
    "beside class_path": (
        at("context.segment", 3),
        "context.segment must stand under context.init_args, got it under context",
    ),
    "in parameters": (
        parameters("LoRA", rnk=3),
        "parameters.rnk is not a setting of LoRA; did you mean parameters.rank?",
    ),
    "in update": (at("update.init_args.lrr", 3), "update.lrr is not a setting of SGD; did you mean update.lr?"),
    "in statistics": (
        rms(fil="x"),
        "update.statistics.fil is not a setting of GradientStatistics; did you mean update.statistics.file?",
    ),
    "in schedule": (at("schedule.evry", 3), "schedule.evry is not a setting; did you mean schedule.every?"),
    "in reset": (at("reset.evry", 3), "reset.evry is not a setting; did you mean reset.every?"),
    "in trainer": (
        at("trainer.acelerator", "cpu"),
        "trainer.acelerator is not a setting; did you mean trainer.accelerator?",
    ),
    "settled by dynlight": (
        at("trainer.max_epochs", 3),
        "trainer.max_epochs is not a setting; see --help and --print_config",
    ),
    "in a logger": (
        at("trainer.logger", {"class_path": "CSVLogger", "init_args": {"save_dr": "x"}}),
        "trainer.logger.save_dr is not a setting of CSVLogger; did you mean trainer.logger.save_dir?",
    ),
    # Values of another type
    "text for yes or no": (
        at("model.compile", "maybe"),
        "model.compile must be true, false or reduce-overhead, got maybe",
    ),
    "another dtype": (at("model.dtype", "float16"), "model.dtype must be float32 or bfloat16, got float16"),
    "text for a number": (at("data.documents", "many"), "data.documents must be a whole number or null, got many"),
    "half a document": (at("data.documents", 2.5), "data.documents must be a whole number or null, got 2.5"),
    "a mapping for text": (at("data.path", {"a": 1}), "data.path must be text, got {'a': 1}"),
    "a list for a section": (at("data", [1, 2]), "data must hold settings by name, got [1, 2]"),
    "text for a section": (at("schedule", "often"), "schedule must hold settings by name, got 'often'"),
    "a number for a class": (at("context", 3), "context.class_path must be TransformerXL or Overlapping, got 3"),
    "text for a length": (at("context.init_args.segment", "long"), "context.segment must be a whole number, got long"),
    "text for a rank": (parameters("LoRA", rank="big"), "parameters.rank must be a whole number, got big"),
    "a number for a range": (parameters("Matching", blocks=3), "parameters.blocks must be a list or null, got 3"),
    "text for a rate": (at("update.init_args.lr", "fast"), "update.lr must be a number, got fast"),
    "a word for a period": (
        at("schedule.every", "often"),
        "schedule.every must be a whole number, a mapping of segments to periods, or never, got often",
    ),
    "half a pass": (at("schedule.passes", 1.5), "schedule.passes must be a whole number, got 1.5"),
    "a number for a word": (at("reset.every", 3), "reset.every must be document or never, got 3"),
    "another reference": (at("reference", "dynamic"), "reference must be static or null, got dynamic"),
    "text for a bound": (at("clip", "hard"), "clip must be a number or null, got hard"),
    "text for a seed": (at("seed", "x"), "seed must be a whole number, got x"),
    "a mapping for devices": (
        at("trainer.devices", {"a": 1}),
        "trainer.devices must be a list, text or a whole number, got {'a': 1}",
    ),
    # Classes that don't exist
    "another context": (
        at("context.class_path", "TransformerXXL"),
        "context.class_path must be TransformerXL or Overlapping, got TransformerXXL",
    ),
    "a context of another kind": (
        at("context.class_path", "LoRA"),
        "context.class_path must be TransformerXL or Overlapping, got LoRA",
    ),
    "other parameters": (parameters("Lora"), "parameters.class_path must be All, LoRA, Pruned or Matching, got Lora"),
    "another update": (
        update("Sgd", lr=0.1),
        "update.class_path must be a class of torch.optim, RMSDynamic, or null, got Sgd",
    ),
    "no optimizer": (
        update("collections.OrderedDict"),
        "update.class_path must be a class of torch.optim, RMSDynamic, or null, got collections.OrderedDict",
    ),
    "another logger": (
        at("trainer.logger", {"class_path": "WandLogger"}),
        "trainer.logger.class_path must be WandbLogger, CSVLogger, TensorBoardLogger, or false, got WandLogger",
    ),
    "another callback": (
        at("trainer.callbacks", [{"class_path": "Nope"}]),
        "trainer.callbacks must be a list of Lightning's callbacks, each with its class_path, got "
        "[{'class_path': 'Nope'}]",
    ),
    # What must be given
    "no context": (at("context", GONE), "context must be given, got nothing"),
    "no class": (
        at("context", {"init_args": {"segment": 16}}),
        "context.class_path must be TransformerXL or Overlapping, got {'init_args': {'segment': 16}}",
    ),
    "no model": (at("model", GONE), "model.pretrained must be given, got nothing"),
    "no path": (at("data", None), "data.path must be given, got nothing"),
    "no segment": (at("context.init_args.segment", GONE), "context.segment must be given, got nothing"),
    # Numbers out of range
    "seed": (at("seed", -1), "seed must be from 0 to 4294967295, got -1"),
    "segment of nothing": (at("context.init_args.segment", 0), "context.segment must be at least 1, got 0"),
    "negative segment": (at("context.init_args.segment", -4), "context.segment must be at least 1, got -4"),
    "negative memory": (at("context.init_args.memory", -4), "context.memory must be at least 0, got -4"),
    "window under the segment": (
        overlapping(16, 8),
        "context.window must be at least 16 (context.segment is 16), got 8",
    ),
    "no documents": (at("data.documents", 0), "data.documents must be at least 1, got 0"),
    "negative tokens": (at("data.max_tokens", -3), "data.max_tokens must be at least 1, got -3"),
    "none together": (at("data.together", 0), "data.together must be at least 1, got 0"),
    "another word for together": (
        at("data.together", "many"),
        "data.together must be a whole number or auto, got many",
    ),
    "clip of nothing": (at("clip", 0), "clip must be above 0, got 0.0; choose null for no bound"),
    "negative clip": (at("clip", -1.0), "clip must be above 0, got -1.0; choose null for no bound"),
    "gradient of nothing": (
        at("gradient", [{"class_path": "Sparse", "init_args": {"share": 0}}]),
        "gradient.share must be above 0 and at most 1, got 0.0",
    ),
    "unknown change of the gradient": (
        at("gradient", [{"class_path": "Rotated"}]),
        "gradient.class_path must be Clip, Sparse or Compressed, got Rotated",
    ),
    "one change of the gradient": (
        at("gradient", {"class_path": "Sparse", "init_args": {"share": 0.1}}),
        "gradient must be a list or null, got {'class_path': 'Sparse', 'init_args': {'share': 0.1}}",
    ),
    "a threshold left out": (
        at("objective", {"class_path": "Surprising"}),
        "objective.threshold must be given, got nothing",
    ),
    "unknown objective": (
        at("objective", {"class_path": "Rewarded"}),
        "objective.class_path must be NextToken, Anchored, Distilled, Replayed or Surprising, got Rewarded",
    ),
    "weight of nothing": (
        at("objective", {"class_path": "Surprising", "init_args": {"threshold": 3, "weight": 0}}),
        "objective.weight must be above 0, got 0.0; choose null to weigh all alike",
    ),
    "more kept than was learned": (at("reset.keep", 1.5), "reset.keep must be from 0 to 1, got 1.5"),
    "text for a trigger": (at("schedule.above", "much"), "schedule.above must be a number or null, got much"),
    "masks from nothing": (
        at("gradient", [{"class_path": "Sparse", "init_args": {"share": 0.1, "by": "fisher"}}]),
        "gradient.statistics.data must name a corpus to collect gradient statistics from where "
        "gradient.statistics.file is null, got null",
    ),
    "period of nothing": (
        at("schedule.every", 0),
        "schedule.every must be at least 1, got 0; choose never to learn nothing",
    ),
    "negative period": (
        at("schedule.every", -2),
        "schedule.every must be at least 1, got -2; choose never to learn nothing",
    ),
    "no first period": (
        at("schedule.every", {1: 2}),
        "schedule.every must give the period at segment 0, got {1: 2}; add an entry 0: 1",
    ),
    "no period": (
        at("schedule.every", None),
        "schedule.every must be at least 1, got null; choose never to learn nothing",
    ),
    "no time between checkpoints": (
        at("checkpoint", {"minutes": 0}),
        "checkpoint.minutes must be above 0, got 0.0; choose checkpoint: null for none",
    ),
    "nothing for a time between checkpoints": (
        at("checkpoint", {"minutes": None}),
        "checkpoint.minutes must be above 0, got null; choose checkpoint: null for none",
    ),
    "a name of two lines": (at("model", {"a\nb": 1}), "model.a b is not a setting; see --help and --print_config"),
    "text for a time between checkpoints": (
        at("checkpoint", {"minutes": "often"}),
        "checkpoint.minutes must be a number, got often",
    ),
    "a number for checkpoints": (at("checkpoint", 5), "checkpoint must hold settings by name, got 5"),
    "in checkpoint": (
        at("checkpoint", {"minuts": 5}),
        "checkpoint.minuts is not a setting...; did you mean checkpoint.minutes?",
    ),
    "another end": (at("on_failure", "retry"), "on_failure must be stop or static, got retry"),
    "an end without a reference": (
        {"on_failure": "static", "reference": None},
        "on_failure must be stop without a reference, got static; set reference: static",
    ),
    "no passes": (at("schedule.passes", 0), "schedule.passes must be at least 1, got 0"),
    "another reset": (at("reset.every", "segment"), "reset.every must be document or never, got segment"),
    # Parameters and the model
    "names of nothing": (
        parameters("Matching", names="nonesuch"),
        "parameters.names must match the name of a weight, got nonesuch; a name looks like model.layers.0...",
    ),
    "no expression": (parameters("Matching", names="("), "parameters.names must be a regular expression, got ( (...)"),
    "blocks outside": (
        parameters("Matching", blocks=[2, 9]),
        "parameters.blocks must be a range within the model's blocks 0 to 3, got [2, 9]",
    ),
    "one block": (parameters("Matching", blocks=[2]), "parameters.blocks must be [first, last], got [2]"),
    "targets of nothing": (
        parameters("LoRA", targets=["nonesuch"]),
        "parameters.targets must name modules of this model, got ['nonesuch']; choose all-linear or some of "
        "down_proj, ...",
    ),
    "targets that are no expression": (
        parameters("LoRA", targets="("),
        "parameters.targets must name modules of this model, got (; choose all-linear or some of down_proj, ...",
    ),
    "rank of nothing": (parameters("LoRA", rank=0), "parameters.rank must be at least 1, got 0"),
    "alpha of nothing": (parameters("LoRA", alpha=0), "parameters.alpha must be above 0, got 0.0"),
    "dropout": (
        parameters("LoRA", dropout=0.1),
        "parameters.dropout must be 0, as dropout would make the score random, got 0.1",
    ),
    # Updates and the weights
    "negative rate": (at("update.init_args.lr", -1.0), "update.lr must be at least 0, got -1.0"),
    "rate without bound": (at("update.init_args.lr", float("inf")), "update.lr must be finite, got inf"),
    "negative rate of Krause's rule": (update("RMSDynamic", lr=-1.0), "update.lr must be at least 0, got -1.0"),
    "negative pull": (update("RMSDynamic", lr=0.1, decay=-1.0), "update.decay must be at least 0, got -1.0"),
    "betas": (
        update("AdamW", betas=[1.5, 0.9]),
        "update must be a rule for the weights that learn, got one that says: Invalid beta parameter at index 0: "
        "1.5; ...",
    ),
    "a rule with a search": (
        update("LBFGS"),
        "update.class_path must be a rule that makes a step from one dense gradient, got LBFGS; choose SGD, ...",
    ),
    "a rule for sparse gradients": (
        update("SparseAdam"),
        "update.class_path must be a rule that makes a step from one dense gradient, got SparseAdam; choose SGD, ...",
    ),
    "a rule for matrices": (
        update("Muon"),
        "update must be a rule for the weights that learn, got one that says: Muon only supports 2D parameters ...; "
        "choose other settings, another rule or other parameters",
    ),
    "a step that is differentiated": (
        update("SGD", differentiable=True),
        "update.differentiable must be false, as weights are changed in place, got true",
    ),
    "no statistics": (
        update("RMSDynamic", lr=0.1),
        "update.statistics.data must name a corpus to collect gradient statistics from where update.statistics.file is "
        "null, got null",
    ),
    "a file of no statistics": (
        rms(file="LIBRARY/rows.csv"),
        "update.statistics.file must be gradient statistics, got LIBRARY/rows.csv (...)",
    ),
    "statistics of another model": (
        rms(file="LIBRARY/other.safetensors"),
        "update.statistics.file must hold the statistics of the 38 learned weights of this model, got "
        "LIBRARY/other.safetensors with others; delete it to collect them anew",
    ),
    "statistics of nothing": (
        rms(segments=0, data={"path": "text"}),
        "update.statistics.segments must be at least 1, got 0",
    ),
    "statistics of a corpus with another setting": (
        rms(data={"pth": "text"}),
        "update.statistics.data must hold settings as data does, got {'pth': 'text'}: got an unexpected keyword "
        "argument 'pth'",
    ),
    "statistics of a corpus without files": (
        rms(data={"path": "text"}),
        "update.statistics.data.data_files must name the files to read as text, got None",
    ),
    "carried on and together": (
        {"reset.every": "never", "data.together": 2},
        "data.together must be 1 with reset.every never, ..., got 2",
    ),
    # The context and the model
    "memory with a table of positions": (
        model("gpt2"),
        "context.class_path must be Overlapping for gpt2, whose positions are not rotary, got TransformerXL; choose "
        "{class_path: Overlapping, init_args: {segment: …, window: …}}",
    ),
    "memory with positions from 2": (
        model("opt"),
        "context.class_path must be Overlapping for opt, whose positions are not rotary, got TransformerXL; choose ...",
    ),
    "memory with dynamic positions": (
        model("dynamic"),
        "context.class_path must be Overlapping for llama, whose rotary positions, of type dynamic, change with the "
        "length read, got TransformerXL; choose ...",
    ),
    "memory with long positions": (
        model("longrope"),
        "context.class_path must be Overlapping for llama, whose rotary positions, of type longrope, ...",
    ),
    "window beyond the table": (
        overlapping(16, 512),
        "context.window must be at most 256, the positions this model was made for, got 512; choose a smaller window",
    ),
    "memory beyond the table": (
        at("context.init_args.memory", 250),
        "context.memory must be at most 240 beside a segment of 16 (this model was made for 256 positions), got 250; "
        "choose a smaller memory or segment",
    ),
    # The model
    "no folder": (
        at("model.pretrained", "./nowhere"),
        "model.pretrained must be a causal language model (Hub name, local folder or tiny-books), got ./nowhere; "
        "there is no such folder",
    ),
    "not on the Hub": (
        at("model.pretrained", "nobody/nothing"),
        "model.pretrained must be a causal language model (...), got nobody/nothing; it is no folder here, and: We ...",
    ),
    "an empty folder": (
        model("empty"),
        "model.pretrained must be a causal language model (...), got LIBRARY/empty; Unrecognized model in "
        "LIBRARY/empty",
    ),
    "another kind of model": (
        model("vision"),
        "model.pretrained must be a causal language model, got LIBRARY/vision of type vit",
    ),
    "a broken config": (
        model("broken"),
        "model.pretrained must be a causal language model (...), got LIBRARY/broken; It looks like the config file at "
        "'LIBRARY/broken/config.json' is not a valid JSON file",
    ),
    "attention that is not installed": (
        at("model.attention", "flash_attention_2"),
        "model.attention must be installed, got flash_attention_2, which is not",
    ),
    "attention that the model lacks": (
        {"model.pretrained": "LIBRARY/bloom", "model.attention": "sdpa"},
        "model.attention must be auto or eager for LIBRARY/bloom, got sdpa, which it does not have",
    ),
    "an adapter alone": (
        model("adapter"),
        "model.pretrained must be a causal language model (...), got LIBRARY/adapter; it holds an adapter alone; merge "
        "it into its model (merge_and_unload of peft) and save that",
    ),
    # The tokenizer
    "no tokenizer": (
        at("model.tokenizer", "./nowhere"),
        "model.tokenizer must be a tokenizer (Hub name or local folder), got ./nowhere; there is no such folder",
    ),
    "no first token": (
        model("unmarked"),
        "model.pretrained must have a tokenizer with a BOS or EOS token, got neither; the first token is "
        "predicted from it: set bos_token in its tokenizer_config.json",
    ),
    "more tokens than rows": (
        model("small"),
        "model.tokenizer must give ids below 200, the rows of the model's embedding, got 2... in a.txt; choose the "
        "tokenizer that the model was trained with",
    ),
    # The data
    "another column": (
        read("csv", "rows.csv", text_column="body"),
        "data.text_column must be one of a, text, got body",
    ),
    "numbers for text": (
        read("csv", "rows.csv", text_column="a"),
        "data.text_column must hold text, got int in row 0 of a",
    ),
    "a null row": (read("json", "null.jsonl"), "data.text_column must hold text, got null in row 1 of text"),
    "an empty file": (
        read("json", "none.jsonl"),
        "data.data_files must be data that can be read, got 'LIBRARY/none.jsonl': there is nothing in it",
    ),
    "no files": (
        read("text", "documents/*.md"),
        "data.data_files must match at least one file, got 'LIBRARY/documents/*.md'",
    ),
    "no data set": (
        at("data", {"path": "nobody/nothing"}),
        "data.path must be data that can be read, got 'nobody/nothing': ...; give a local folder, or go online",
    ),
    "no UTF-8": (
        read("text", "latin.txt"),
        "data.data_files must be data that can be read, got 'LIBRARY/latin.txt': 'utf-8' codec can't decode ...; "
        "convert it to UTF-8",
    ),
    "another split": (at("data.split", "validation"), "data.split must be one of train, got validation"),
    # The trainer
    "16-bit floats": (
        at("trainer.precision", "16-mixed"),
        "trainer.precision must be 32-true or bf16-mixed, got 16-mixed; ...",
    ),
    "learned weights in bf16": (
        at("trainer.precision", "bf16-true"),
        "trainer.precision must be 32-true or bf16-mixed, got bf16-true; learned weights are fp32 ... set model.dtype: "
        "bfloat16",
    ),
    "another precision": (at("trainer.precision", "bf8"), "trainer.precision must be 32-true or bf16-mixed, got bf8"),
    "two types in one layer": (
        {"model.dtype": "bfloat16", **parameters("Matching", names="mlp")},
        "trainer.precision must be bf16-mixed where some weights learn, in fp32, and others stay in bf16, got "
        "32-true; or set model.dtype: float32",
    ),
    "another accelerator": (
        at("trainer.accelerator", "abacus"),
        "trainer.accelerator must be what Lightning can run here, got something else: ...",
    ),
    "copies on two devices": (
        at("trainer", {"accelerator": "cpu", "strategy": "ddp", "devices": 2}),
        "trainer.strategy must be document_parallel with reset.every document, got DDPStrategy, which would average "
        "the gradients of different documents",
    ),
    "two devices": (
        at("trainer.devices", 2),
        "trainer.strategy must be document_parallel with reset.every document, got DDPStrategy, which would ...",
    ),
    "copies on one device": (
        at("trainer.strategy", "ddp"),
        "trainer.strategy must be document_parallel with reset.every document, got DDPStrategy, which would ...",
    ),
    "documents apart that build on each other": (
        {"trainer.strategy": "document_parallel", "trainer.devices": 2, "reset.every": "never"},
        "trainer.strategy must be ddp on several devices with reset.every never, got document_parallel, in which none "
        "learns from what another has read",
    ),
    "nothing learned in step": (
        {"trainer.strategy": "ddp", "trainer.devices": 2, "reset.every": "never", "update": None},
        "trainer.strategy must be document_parallel with update null, got DDPStrategy, which needs gradients to average",
    ),
    "a hook for CUDA": (
        {"trainer.strategy": hooked("default_hooks.bf16_compress_hook"), "trainer.devices": 2, "reset.every": "never"},
        "trainer.strategy.ddp_comm_hook must be fp16_compress_hook, powerSGD_hook or dynlight.compressed_hook on CPU, got bf16_compress_hook, ...",
    ),
    "a hook that waits": (
        {"trainer.strategy": hooked("powerSGD_hook.powerSGD_hook"), "trainer.devices": 2, "reset.every": "never"},
        "trainer.strategy must send all gradients at once with this hook on CPU, where several parts would wait for each "
        "other, got no bucket_cap_mb; set trainer.strategy.init_args.bucket_cap_mb: 1000",
    ),
    "weights in parts of another kind": (
        at("trainer.strategy", {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}),
        "trainer.strategy must be auto, document_parallel, ddp, or model_parallel for a model larger than one device, got "
        "ModelParallelStrategy",
    ),
    "parts, and documents together": (
        PARTS | at("data.together", 2),
        "data.together must be 1 with trainer.strategy model_parallel, in which all devices adapt one document, got 2",
    ),
    "parts, and as many documents as fit": (
        PARTS | at("data.together", "auto"),
        "data.together must be 1 with trainer.strategy model_parallel, in which all devices adapt one document, got auto",
    ),
    "parts of a mixture": (
        PARTS | {"mixture": {}, "update": None},
        "trainer.strategy must be document_parallel or auto with rates or a mixture, got model_parallel, which keeps one "
        "set of weights",
    ),
    "a rule for whole weights": (
        PARTS | update("Adafactor"),
        "update.class_path must be a rule that treats each weight by itself with trainer.strategy model_parallel, where "
        "none is whole, got Adafactor; choose SGD, Adam, AdamW or RMSprop",
    ),
    "statistics of whole weights": (
        PARTS | rms(),
        "update.class_path must be a rule that treats each weight by itself ..., got RMSDynamic; choose SGD, Adam, ...",
    ),
    "parts that are compiled": (
        PARTS | at("model.compile", True),
        "model.compile must be false with trainer.strategy model_parallel, got true",
    ),
    "parts that ask their score whether to learn": (
        {**PARTS, "schedule.above": 3.0},
        "schedule and objective must learn from every segment that is due with trainer.strategy model_parallel, where each "
        "device would ask its score, got a bound on the score",
    ),
    "a teacher by name alone": (
        {"teacher": "tiny-books"},
        "teacher must be null, or {class_path: Pretrained, init_args: {pretrained: …}}, got tiny-books",
    ),
    "a teacher compiled by itself": (
        {"teacher": {"class_path": "Pretrained", "init_args": {"pretrained": "tiny-books", "compile": True}}},
        "teacher.compile must be left out, as model.compile is for both, got True",
    ),
    "memories that are no list": (
        {"memories": "NGrams"},
        "memories must be a list of classes, each with its class_path, got NGrams",
    ),
    "an unknown memory": (
        {"memories": [{"class_path": "Cache"}]},
        "memories.class_path must be NeuralCache, NGrams or OutputBias, got Cache",
    ),
    "a teacher that is not there": (
        {"teacher": {"class_path": "Pretrained", "init_args": {"pretrained": "./nowhere"}}},
        "teacher.pretrained must be a causal language model (Hub name, local folder or tiny-books), got ./nowhere; ...",
    ),
    "a teacher of other tokens": (
        {"teacher": {"class_path": "Pretrained", "init_args": {"pretrained": "tiny-books"}}},
        "teacher.pretrained must predict the ... tokens that the model does, got 4,096; choose a model of the same family",
    ),
    "no strategy": (at("trainer.strategy", "abacus"), "trainer.strategy must be what Lightning can run here, got ..."),
    # Many rates
    "a rate beside rates": (
        {"rates": [0.1], "update.init_args.lr": 0.5},
        "update.lr must be left out where there are rates, a mixture or memories, got 0.5; set rates: [0.5]",
    ),
    "no rates": (
        {"rates": [], "update.init_args": GONE},
        "rates must be different learning rates, at least one, got []",
    ),
    "a rate that is text": (
        {"rates": ["fast"], "update.init_args": GONE},
        "rates must be ...a number..., got fast",
    ),
    "a negative rate": (
        {"rates": [-0.1], "update.init_args": GONE},
        "rates must be at least 0 and finite, got -0.1",
    ),
    "two rules and no mixture": (
        at("update", [{"class_path": "SGD"}, {"class_path": "Adam"}]),
        "update must be one rule where nothing is mixed, got 2; set mixture: {}",
    ),
    "a mixture of another kind": (at("mixture", 3), "mixture must be ..."),
    "a setting of no mixture": (
        at("mixture", {"switch": 0.1}),
        "mixture.switch is not a setting of Mixture; did you mean mixture.switching?",
    ),
    "a share above 1": (
        {"mixture": {"switching": 2.0}, "update.init_args": GONE},
        "mixture.switching must be at least 0 and under 1, got 2.0",
    ),
    "a rule for whole matrices in a mixture": (
        {"mixture": {}, "update": {"class_path": "Adafactor"}},
        "update.class_path must be a rule that treats each weight by itself in a mixture, got Adafactor; ...",
    ),
    # The folder
    "out exists": (
        at("out", "LIBRARY/documents"),
        "out must be a new folder, got LIBRARY/documents; choose another or set overwrite: true",
    ),
    "out under a file": (
        at("out", "LIBRARY/rows.csv/run"),
        "out must be a folder that can be made, got LIBRARY/rows.csv/run; LIBRARY/rows.csv cannot be written to",
    ),
}
KNOWN_AFTER_LOADING = {
    "a model with time in front": (
        {"model.pretrained": "LIBRARY/xlnet"} | overlapping(16, 32),
        "model.pretrained must be a causal language model, got LIBRARY/xlnet of type xlnet, in which a token sees those "
        "after it",
    ),
    "an adapter that is not linear": (
        {"model.pretrained": "LIBRARY/dora"},
        "model.pretrained must hold no adapter but of a kind that can be merged into its weights, got LIBRARY/dora; ...",
    ),
    "no weights": (
        model("unweighted"),
        "model.pretrained must be a causal language model (...), got LIBRARY/unweighted; ... no file named "
        "model.safetensors found in directory LIBRARY/unweighted",
    ),
    "a pickle": (
        model("pickle"),
        "model.pretrained must be a causal language model (...), got LIBRARY/pickle; its weights are a pickle, "
        "which may run code; save them as safetensors",
    ),
    "half a file": (
        model("cut"),
        "model.pretrained must be a causal language model (...), got LIBRARY/cut; its weights cannot be read (...)",
    ),
    "a weight less": (
        model("missing"),
        "model.pretrained must hold every weight of the model, got LIBRARY/missing without "
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a model that sees what follows": (
        {**model("bert"), **overlapping(16, 32)},
        "model.pretrained must be a causal language model, got LIBRARY/bert of type bert, in which a token sees "
        "those after it",
    ),
    "statistics of a corpus that is not there": (
        rms(data={"path": "text", "data_files": "LIBRARY/nothing/*.txt"}),
        "update.statistics.data.data_files must match at least one file, got 'LIBRARY/nothing/*.txt'",
    ),
}
# Files that are no configuration.
FILES = {
    "brackets": ("context: [1, {", "config must be YAML, got run.yaml: ... in line 1"),
    "tabs": ("context:\n\tsegment: 3", "config must be YAML, got run.yaml: found character '\\t' that ... in line 2"),
    "a list": ("- a\n- b", "config must hold sections as in --help, got run.yaml with ['a', 'b'] in it"),
    "text": ("hello", "config must hold sections as in --help, got run.yaml with 'hello' in it"),
    "nothing": ("", "config must hold sections as in --help, got run.yaml with nothing in it"),
}
# Arguments behind a configuration that runs.
ARGUMENTS = {
    "a rate that is none": (["--update.lr", "fast"], "update.lr must be a number, got fast"),
    "a segment that is none": (["--context.segment=x"], "context.segment must be a whole number, got x"),
    "no file": (["--config", "none.yaml"], "config must be a YAML file, got none.yaml; there is no such file"),
    "a folder": (["--config", "."], "config must be a YAML file, got .; it is a folder"),
    "half of config": (["--conf", "run.yaml"], "conf is not a setting; see --help and --print_config"),
    "half of accelerator": (
        ["--trainer.accel", "cpu"],
        "trainer.accel is not a setting; did you mean trainer.accelerator?",
    ),
    "half of lr": (["--update.l", "1"], "update.l is not a setting of SGD; did you mean update.lr?"),
    "no flag": (["run.yaml"], "run.yaml is not a setting; see --help and --print_config"),
    "no value": (["--seed"], "seed must be given a value, got nothing"),
    "another value": (["--context.segment", "-1"], "context.segment must be at least 1, got -1"),
    "another name": (["--data.colum=text"], "data.colum is not a setting; did you mean data.text_column?"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory, byte_tokenizer):
    """Models and documents, whole and broken."""
    root = tmp_path_factory.mktemp("library")
    save_documents(root / "documents")
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "rows.csv").write_text("a,text\n1,hello there\n2,more of it\n")
    (root / "null.jsonl").write_text('{"text": "hello"}\n{"text": null}\n')
    (root / "none.jsonl").write_text("")
    for architecture in ("llama", "gpt2", "opt"):
        save_model(root / architecture, byte_tokenizer, architecture)
    rope = {"rope_theta": 10000.0, "factor": 2.0}
    save_model(root / "dynamic", byte_tokenizer, rope_parameters=rope | {"rope_type": "dynamic"})
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
    save_model(root / "longrope", byte_tokenizer, rope_parameters=rope | factors | {"rope_type": "longrope"})
    save_model(root / "small", byte_tokenizer, rows=200)
    unmarked = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    save_model(root / "unmarked", unmarked)
    weights = load_file(root / "llama/model.safetensors")
    save_file({"some.weight": torch.ones(3)}, root / "other.safetensors")

    def broken(name, *removed):
        shutil.copytree(root / "llama", root / name)
        for file in removed:
            (root / name / file).unlink()
        return root / name

    broken("empty", *(file.name for file in (root / "llama").iterdir()))
    broken("unweighted", "model.safetensors")
    torch.save(weights, broken("pickle", "model.safetensors") / "pytorch_model.bin")
    (broken("broken") / "config.json").write_text("{")
    (broken("vision") / "config.json").write_text(json.dumps({"model_type": "vit"}))
    whole = (root / "llama/model.safetensors").read_bytes()
    (broken("cut") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken("missing") / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=len(byte_tokenizer), **sizes)).save_pretrained(root / "bert")
    byte_tokenizer.save_pretrained(root / "bert")
    bloom = BloomConfig(vocab_size=len(byte_tokenizer), hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(root / "bloom")
    byte_tokenizer.save_pretrained(root / "bloom")
    XLNetLMHeadModel(XLNetConfig(vocab_size=len(byte_tokenizer), d_model=32, n_layer=1, n_head=2)).save_pretrained(
        root / "xlnet"
    )
    byte_tokenizer.save_pretrained(root / "xlnet")
    shutil.copytree(root / "llama", root / "dora")
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(LlamaForCausalLM.from_pretrained(root / "llama"), dora).save_pretrained(root / "dora")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(root / "llama"), lora).save_pretrained(root / "adapter")
    byte_tokenizer.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def refused(library, tmp_path, monkeypatch, capsys):
    """Runs what is to be refused, in an empty folder, and returns the one line that says why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path.parent / f"{tmp_path.name} cache"))

    def run(changes=None, arguments=(), text=None):
        config = configuration(library / "llama", f"{library}/documents/*.txt", tmp_path / "out")
        for setting, value in (changes or {}).items():
            *sections, last = setting.split(".")
            section = config
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
            if value is GONE:
                del section[last]
        text = yaml.safe_dump(config) if text is None else text
        (tmp_path / "run.yaml").write_text(text.replace("LIBRARY", str(library)))
        status = fit.main(["--config", "run.yaml", *arguments])
        output = capsys.readouterr()
        assert status == 2, output.err
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert output.err.endswith("\n")
        assert output.err.count("\n") == 1, output.err
        assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"], "nothing is left behind"
        return output.err.removeprefix("error: ").removesuffix("\n").replace(str(library), "LIBRARY")

    return run


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where weights are loaded."""

    def load(self):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Pretrained, "load", load)


def assert_says(message, expected):
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert re.fullmatch(pattern, message), f"\n{message}\nis not\n{expected}"


@pytest.mark.parametrize(("changes", "expected"), KNOWN_BEFORE_LOADING.values(), ids=KNOWN_BEFORE_LOADING)
def test_refused_before_weights_are_loaded(refused, unloaded, changes, expected):
    assert_says(refused(changes), expected)


@pytest.mark.parametrize(("changes", "expected"), KNOWN_AFTER_LOADING.values(), ids=KNOWN_AFTER_LOADING)
def test_refused_once_weights_are_loaded(refused, changes, expected):
    assert_says(refused(changes), expected)


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_files_that_are_no_configuration(refused, unloaded, text, expected):
    assert_says(refused(text=text), expected)


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_none(refused, unloaded, arguments, expected):
    assert_says(refused(arguments=arguments), expected)


def test_a_section_may_not_name_a_class_by_its_settings_alone(refused, unloaded):
    message = refused({"context": GONE}, ["--context.segment", "3"])
    assert_says(message, "context.class_path must be TransformerXL or Overlapping, got ...")


def test_an_existing_run_is_kept_when_its_replacement_is_refused(refused, library, tmp_path, capsys):
    old = tmp_path.parent / f"{tmp_path.name} old"
    old.mkdir()
    (old / "summary.json").write_text("{}")
    refused({"out": str(old), "overwrite": True, "clip": -1.0})
    assert (old / "summary.json").read_text() == "{}"


def test_what_a_file_gives_nothing_for_has_its_default(library, tmp_path):
    config = configuration(library / "llama", f"{library}/documents/*.txt", tmp_path / "out")
    config["data"]["max_tokens"] = 20
    config["model"]["dtype"] = None
    config |= dict.fromkeys(["parameters", "update", "reset", "trainer", "mixture", "seed"])
    config["schedule"] = {"passes": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 0
    assert fit.main(["--config", str(tmp_path / "out/config.yaml"), "--overwrite=true"]) == 0
    known = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (known["seed"], known["schedule"]["passes"], known["model"]["dtype"]) == (0, 1, "float32")


def in_another_file(self):
    return int("a bug")


@pytest.mark.parametrize("load", [in_another_file, staticmethod(partial(int, "a bug"))])
def test_bugs_keep_their_traceback(library, tmp_path, monkeypatch, load):
    monkeypatch.setattr(Pretrained, "load", load)
    config = configuration(library / "llama", f"{library}/documents/*.txt", tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="a bug"):
        fit.main(["--config", str(tmp_path / "run.yaml")])


def test_a_document_whose_nats_are_not_finite_stops_and_stands_in_no_sum(library, tmp_path, capsys):
    config = configuration(library / "llama", f"{library}/documents/*.txt", tmp_path / "out")
    config["update"]["init_args"]["lr"] = 1e6
    # The second document is as long as one segment: it ends before what it learned can do harm.
    config["data"]["documents"] = 2
    config["data"]["data_files"] = [f"{library}/documents/a.txt", f"{tmp_path}/short.txt"]
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert fit.main(["--config", str(tmp_path / "run.yaml")]) == 3
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error:")]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    (failed,) = summary["failed"]
    assert failed["name"].endswith("a.txt")
    assert errors == [
        f"error: document {failed['name']} must be read to its end, got stopped in segment {failed['segment']} as "
        f"{failed['reason']}; lower update.lr or set clip (its sums are kept out of the totals)"
    ]
    assert failed["reason"] in ("nats were not finite", "gradients were not finite"), "whichever comes first"
    assert failed["segment"] > 0, "the first segment is scored by the model as it came"
    assert summary["documents"] == 1
    assert summary["bytes"] == len("short")
    assert summary["nats"] > 0
    assert "Traceback" not in output.err
    assert "failed" in output.out


NESTED = """Parser key "update":
  Does not validate against any of the Union subtypes
  Subtypes: [collections.abc.Callable, <class 'NoneType'>]
  Errors:
    - Type expects a function or a callable class: Parser key "statistics":
        Does not validate against any of the Union subtypes
        Errors:
          - Problem with given class_path 'dynlight.GradientStatistics':
              Parser key "segments":
                Expected a <class 'int'>. Got value: x
          - Expected a <class 'NoneType'>
        Given value type: <class 'dict'>
        Given value: {'segments': 'x'}. Got value: Namespace(class_path='dynlight.RMSDynamic')
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'RMSDynamic'}"""


def test_the_innermost_problem_is_told():
    assert one_line(NESTED, []) == "update.statistics.segments must be a whole number, got x"


def test_what_the_parser_says_of_no_setting_is_told_in_one_line():
    assert one_line("something\n  else", []) == "something else"


def test_the_causal_model_is_not_taken_for_one_that_sees_what_follows(library):
    assert isinstance(Pretrained(str(library / "llama")).load(), LlamaForCausalLM)
