"""Parameters: which weights may learn.

A choice prepares a model in place, leaving `requires_grad` true on exactly the weights that may learn; those are fp32
afterwards, whatever the rest is (a small update vanishes in bf16). A new choice is a class with `prepare`.
"""

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlight.errors import SettingError, require, require_at_least


class Parameters(ABC):
    """Says which weights of a model may learn."""

    are_adapters = False  # whether the weights that learn are added to the model, without effect at first

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> None:
        """Leaves `requires_grad` true on exactly the weights that may learn, and makes these fp32."""


class All(Parameters):
    """Every weight learns."""

    def prepare(self, model: PreTrainedModel) -> None:
        _learn(model, [name for name, _ in model.named_parameters()])

    def __str__(self) -> str:
        return "all weights"


class LoRA(Parameters):
    """Low-rank adapters learn; the model's own weights are frozen. The adapters are PEFT's.

    Formula: y = W x + (alpha / rank) · B A x, with A [rank, in] random and B [out, rank] zero at first, so that the
    adapted model starts equal to the static one. Source: Hu et al. 2021 (arXiv 2106.09685).

    Args:
        rank: rows of A, columns of B.
        alpha: scale of the adapter's output, in units of rank.
        targets: `all-linear` (all but the output layer), or the names of modules, or one regular expression.
        dropout: must be 0: dropout would make the score random.
        seed: of A's values, the same for every document.
        ranks: of some modules, in place of `rank`: by a regular expression that the end of their names matches; the first
            that does counts.

    Raises:
        SettingError: if a number is out of range, or no module of the model matches `targets` or a pattern of `ranks`.
    """

    are_adapters = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | list[str] = "all-linear",
        dropout: float = 0.0,
        seed: int = 0,
        ranks: dict[str, int] | None = None,
    ) -> None:
        for pattern, own in (ranks or {}).items():
            require_at_least(f"parameters.ranks.{pattern}", 1, own)
            try:
                re.compile(pattern)
            except re.error as error:
                got = f"{pattern} ({error})"
                raise SettingError("parameters.ranks", "have regular expressions as keys", got=got) from error
        if rank < 1:
            raise SettingError("parameters.rank", "be at least 1", got=rank)
        if not alpha > 0:
            raise SettingError("parameters.alpha", "be above 0", got=alpha)
        if dropout != 0:
            raise SettingError("parameters.dropout", "be 0, as dropout would make the score random", got=dropout)
        self.rank = rank
        self.alpha = alpha
        self.targets = targets
        self.seed = seed
        self.ranks = dict(ranks or {})

    def prepare(self, model: PreTrainedModel) -> None:
        names = ", ".join(_linear_names(model))  # before PEFT wraps some
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets,
            lora_dropout=0.0,
            rank_pattern=dict(self.ranks),
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # PEFT warns that GPT-2 stores its matrices transposed, and then does the right thing.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            # PEFT warns that an adapter on a tied output layer cannot be merged, which nothing here does.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
            # PEFT looks for the rank and alpha of experts, which it has set itself, among modules; experts are weights.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            torch.manual_seed(self.seed)
            try:
                inject_adapter_in_model(config, model)
            except (ValueError, re.error) as error:
                if "incompatible" in str(error):  # with layers that read a weight past an adapter
                    reason = shorten(" ".join(str(error).split()), 200, placeholder=" …")
                    must = "name modules that PEFT can adapt"
                    raise SettingError("parameters.targets", must, got=self.targets, advice=reason) from error
                raise SettingError(
                    "parameters.targets",
                    "name modules of this model",
                    got=self.targets,
                    advice=f"choose {'' if self.targets == 'all-linear' else 'all-linear or '}some of {names}",
                ) from error
        everything = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        adapted = list(everything)
        for pattern in self.ranks:  # the first that matches counts, as PEFT has it
            matching = [name for name in adapted if re.match(rf"(.*\.)?({pattern})$", name)]
            if not matching:
                must = "match the end of the name of an adapted module that no earlier pattern matches"
                advice = f"adapted are {', '.join(sorted({name.rpartition('.')[2] for name in everything}))}"
                raise SettingError(f"parameters.ranks.{pattern}", must, got="none", advice=advice)
            adapted = [name for name in adapted if name not in matching]
        replace_modules(model, lambda module: AdaptedLinear(module) if type(module) is lora.Linear else None)
        _learn(model, [name for name, _ in model.named_parameters() if "lora_" in name])

    def __str__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        ranks = "".join(f", {pattern} {rank}" for pattern, rank in self.ranks.items())
        return f"LoRA(rank {self.rank}{ranks}, alpha {self.alpha:g}, {targets})"


class AdaptedLinear(nn.Module):
    """A linear map with one adapter, in the place of PEFT's: y = W x + B (s A x), with s = alpha / rank.

    PEFT's looks for merged, mixed and variant adapters at each call, which takes longer than the adapter on short
    segments, and scales the wide B A x rather than the narrow A x. Weights and their names stay PEFT's.
    """

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.base_layer = adapted.base_layer
        self.lora_A = nn.ModuleDict({name: NarrowLinear(narrow) for name, narrow in adapted.lora_A.items()})
        self.lora_B = nn.ModuleDict({name: NarrowLinear(narrow) for name, narrow in adapted.lora_B.items()})
        self.scale = adapted.scaling["default"]
        self._is_on = True

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapter on or off; PEFT's layers have the same method."""
        self._is_on = enabled

    def get_base_layer(self) -> nn.Module:
        """The linear map without its adapter; PEFT's layers have the same method."""
        return self.base_layer

    @torch.no_grad()
    def merge(self) -> None:
        """Adds s B A to the weight of the base layer; PEFT's layers have the same method."""
        weight = self.base_layer.weight
        change = self.scale * self.lora_B["default"].weight @ self.lora_A["default"].weight
        weight.copy_(weight + (change if isinstance(self.base_layer, nn.Linear) else change.T))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self._is_on:
            return y
        a, b = self.lora_A["default"], self.lora_B["default"]
        narrow: Tensor = a(x.to(a.weight.dtype))  # type: ignore[arg-type] # a parameter's type
        return y + b(narrow * self.scale).to(y.dtype)


class NarrowLinear(nn.Module):
    """A linear map whose gradient is added up in the same order for a document alone and for documents together.

    `F.linear` adds in another order where one side is as narrow as an adapter's, and rules such as Adam, which divide a
    gradient by its size however small, make a difference in the last bit grow.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Pruned(Parameters):
    """Of the weights of another choice those units go on learning that contribute most; the others stop as a document is read.

    A unit is a rank of an adapter, whose contribution becomes 0 when it stops, or else all weights of a module, which stay as
    they are: where the first blocks of a model have stopped, the backward ends above them.

    Formula: after each update Ī ← β Ī + (1 − β) I and Ū ← β Ū + (1 − β) |I − Ī|, with I = |w · ∂loss/∂w| of each weight and β 0.85; a
    unit's score is the mean of Ī · Ū over its weights (of a rank: over its row of A, and over its column of B, added). After each
    `every` updates of a document half of the units that still learn stop, those of the lowest score, until the share `keep` is
    left; where nothing is ever reset, of the whole stream. Source: AdaLoRA, Zhang et al. 2023 (arXiv 2303.10512), whose adapters have a third factor, and whose ranks may come back.

    Args:
        of: the choice that names the weights.
        keep: the share of units that is left in the end, above 0, at most 1.
        every: updates between two prunings.

    Raises:
        SettingError: if a number is out of range.
    """

    def __init__(self, of: Parameters, keep: float = 0.25, every: int = 8) -> None:
        require(not isinstance(of, Pruned), "parameters.of", "be a choice that is not pruned itself", got="Pruned")
        require(0 < keep <= 1, "parameters.keep", "be above 0 and at most 1", got=keep)
        because = " with adapters, whose first gradients say nothing of any rank" if of.are_adapters else ""
        require_at_least("parameters.every", 2 if of.are_adapters else 1, every, because=because)
        self.of = of
        self.keep = keep
        self.every = every

    @property
    def are_adapters(self) -> bool:
        return self.of.are_adapters

    def prepare(self, model: PreTrainedModel) -> None:
        self.of.prepare(model)

    def left(self, units: int, updates: int) -> int:
        """How many of so many units learn on after so many updates.

        >>> [Pruned(All(), keep=0.2, every=8).left(20, updates) for updates in (0, 7, 8, 16, 24, 80)]
        [20, 20, 10, 5, 4, 4]
        """
        return max(math.ceil(self.keep * units), math.ceil(units / 2 ** (updates // self.every)))

    def __str__(self) -> str:
        return f"{self.of}, pruned to {100 * self.keep:g}%, half of it every {self.every} updates"


def adapters_of(model: nn.Module) -> list[AdaptedLinear | BaseTunerLayer]:
    """The modules of a model that hold adapters, each of which can be switched by `enable_adapters`."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear | BaseTunerLayer)]


def merge_adapters(model: nn.Module) -> bool:
    """Adds what the model's adapters have learned to the weights beside them, and takes the adapters away.

    Returns whether anything of PEFT's is left, which cannot be merged.
    """

    def merged(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, AdaptedLinear | BaseTunerLayer):
            return None
        module.merge()
        base: nn.Module = module.get_base_layer()
        return base

    replace_modules(model, merged)
    vars(model).pop("peft_config", None)  # by which PEFT would take the next adapter for a second one
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def replace_modules(model: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Puts in the place of each module the one that `new` makes of it, where it makes one."""
    for name, module in list(model.named_modules()):
        if (replacement := new(module)) is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replacement)


class Matching(Parameters):
    """The weights whose name matches and whose block lies in a range learn.

    With a block range the backward stops at the first of these blocks, and costs that much less.

    Args:
        names: regular expression searched in a parameter's name, e.g. `mlp`, `q_proj`, `bias$`, `norm`.
        blocks: `[first, last]`, both included, negative ones counted from the end: `[-2, -1]` are the last two.
            Weights outside the blocks (embeddings, last norm, output layer) then don't learn.

    Raises:
        SettingError: if `names` is no regular expression, `blocks` no range of this model, or nothing matches.
    """

    def __init__(self, names: str = "", blocks: list[int] | None = None) -> None:
        try:
            self.names = re.compile(names)
        except re.error as error:
            raise SettingError("parameters.names", "be a regular expression", got=f"{names} ({error})") from error
        if blocks is not None and len(blocks) != 2:
            raise SettingError("parameters.blocks", "be [first, last]", got=blocks)
        self.blocks = blocks

    def prepare(self, model: PreTrainedModel) -> None:
        wanted, of_block = range(0), block_of_each_weight(model)
        if self.blocks is not None:
            count = len(blocks_of(model))
            first, last = (block + count if block < 0 else block for block in self.blocks)
            if not 0 <= first <= last < count:
                raise SettingError(
                    "parameters.blocks", f"be a range within the model's blocks 0 to {count - 1}", got=self.blocks
                )
            wanted = range(first, last + 1)
        names = [
            name
            for name, _ in model.named_parameters()
            if self.names.search(name) and (self.blocks is None or of_block.get(name) in wanted)
        ]
        if not names:
            raise SettingError(
                "parameters.names",
                "match the name of a weight",
                got=self.names.pattern,
                advice=f"a name looks like {_example_name(model)}",
            )
        _learn(model, names)

    def __str__(self) -> str:
        names = f"weights matching {self.names.pattern}" if self.names.pattern else "weights"
        return names + (f" of blocks {self.blocks[0]} to {self.blocks[1]}" if self.blocks else "")


def _learn(model: nn.Module, names: list[str]) -> None:
    """Lets exactly the parameters of these names learn, in fp32."""
    learned = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learned)
        if name in learned:
            parameter.data = parameter.data.float()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model in order, by name: the longest list of modules that lies in no other list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: each for name, each in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        return {}
    name, longest = max(outer.items(), key=lambda entry: len(entry[1]))
    return {f"{name}.{number}": block for number, block in enumerate(longest)}


def block_of_each_weight(model: nn.Module) -> dict[str, int]:
    """The number of each weight's block, by the weight's name, for weights that lie in a block."""
    return {
        f"{block}.{name}": number
        for number, (block, module) in enumerate(blocks_of(model).items())
        for name, _ in module.named_parameters()
    }


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def _example_name(model: nn.Module) -> str:
    return next(iter(block_of_each_weight(model)), "")
