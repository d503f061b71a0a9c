"""Trial: does a model read each row of a batch as it reads the row alone?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynlight.documents.segments import Context, Cut, Segment
from dynlight.learning.rows import Batch, kinds_one_by_one
from dynlight.learning.weights import read

_COLUMNS = 7  # no multiple of the rows, so that axes in another order are found out
# How far the logits of a row may be apart, as a share of their size; experts, say, are chosen anew by the last bit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.no_grad()
def reason_against_rows(
    model: PreTrainedModel, context: Context, weights: Sequence[nn.Parameter], batch: Batch
) -> str | None:
    """Why a model cannot read rows that each have weights of their own; None: it can.

    Up to three rows of different weights and tokens are read together, then each alone by the model with the row's weights.
    So a model that mixes rows, that reads a weight past the module which holds it, or that asks for something no row
    has, is found out before a run. The stacks are left changed.

    Args:
        model: whose modules are in rows.
        context: what a forward has in view.
        weights: θ0 of the learned weights, in the model.
        batch: what holds their stacks.
    """
    if not weights:
        return None
    rows = min(3, len(batch.stacks[0]))
    inputs = _tokens(model, rows)
    initial, whole = [weight.data for weight in weights], list(batch.stacks)
    batch.stacks[:] = [stack[:rows] for stack in whole]
    for stack, theta in zip(batch.stacks, initial, strict=True):
        for row, weight in enumerate(stack):
            weight.copy_(theta * (1 + 0.05 * row) + 0.01 * row)
    try:
        with batch.of(inputs):
            together = _logits(model, inputs, context)
        alone = []
        for row in range(rows):
            for weight, stack in zip(weights, batch.stacks, strict=True):
                weight.data = stack[row]
            alone.append(_logits(model, inputs[row : row + 1], context))
    except Exception as error:  # whatever a model raises that is not made for rows
        modules = ", ".join(kinds_one_by_one(model)) or "forward"
        return f"whose {modules} cannot be read row by row ({str(error).splitlines()[0].rstrip('.')})"
    finally:
        batch.stacks[:] = whole
        for weight, theta in zip(weights, initial, strict=True):
            weight.data = theta
    expected = torch.cat(alone)
    apart = (together - expected).abs().max() / expected.abs().max()
    if apart <= _TOLERANCE[together.dtype]:
        return None
    return f"whose logits of a row are {apart:.2g} apart from the row alone"


def _logits(model: PreTrainedModel, inputs: Tensor, context: Context) -> Tensor:
    segment = Segment((), Cut(0, 0, _COLUMNS, 0), inputs, targets=inputs, scored=(), bytes=())
    return read(model, segment, None, context)[0]


def _tokens(model: PreTrainedModel, rows: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return (torch.arange(rows * _COLUMNS, device=model.device) * 13 + 5).view(rows, _COLUMNS) % vocabulary
