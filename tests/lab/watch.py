"""Watches a model at work, whatever is in its parts: what attention reads, what each block adds.

No other program of the lab knows the names of parts of the model, apart from the edits in
solutions.py and model.js. If you rename one of these in gpt.py, rename it here: blocks, sa.proj,
ln_f, lm_head, token_embedding_table.
"""
import sys
from collections import namedtuple
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Of one text with T characters. Of each layer's softmax, (n_layer, n_head, T, T) each: the matrix
# product before it, the scores that it is given (-inf where the mask hides them), and the attention
# weights; None where a layer has no softmax of its own. lens: the logits if the model stopped
# before the first block or after one (n_layer + 1, T, vocab_size). losses: that of each character
# but the first (T - 1).
Seen = namedtuple('Seen', 'products scores weights lens logits losses')

MISSING = ('Error: watch.py looks for a part that this model does not have ({}): if yours has '
           'another name, write that into tests/lab/watch.py')


def attention(gpt, layer):
    """The attention of this layer, counted from 1."""
    return gpt.model.blocks[layer - 1].sa


class Softmaxes(TorchFunctionMode):
    """Sees each call of torch, and keeps those of softmax with four dimensions, (B, nh, T, T)."""

    def __init__(self):
        super().__init__()
        self.product, self.calls = None, []  # calls: (product, scores, weights)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, '__name__', '')
        if name in ('matmul', '__matmul__'):
            self.product = result
        if name == 'softmax' and result.dim() == 4:
            # Without such a product (of einsum, say), nothing is known of where scores come from.
            known = self.product is not None and self.product.shape == result.shape
            self.calls.append((self.product if known else result, args[0], result))
        return result


def switch_off(heads, n_head, proj, inputs):
    """A hook of proj: sets the output of these heads, counted from 1, to 0 before it mixes them."""
    out = inputs[0].clone().unflatten(-1, (n_head, -1))  # (B, T, C) -> (B, T, nh, hs)
    out[:, :, [head - 1 for head in heads]] = 0
    return out.flatten(-2)  # (B, T, C)


@torch.no_grad()
def watch(gpt, text, off=()):
    """What the model of gpt computes for a text, as a Seen. SystemExit if it lacks those names.

    off: heads that are switched off, as pairs (layer, head), counted from 1.
    """
    model, ids = gpt.model.eval(), torch.tensor([gpt.encode(text)])  # (1, T)
    stream = []  # x before the first block and after each, (T, C)
    try:
        model.ln_f, model.lm_head, model.blocks[0], attention(gpt, 1).proj
    except (AttributeError, IndexError) as error:
        sys.exit(MISSING.format(error))
    with ExitStack() as hooks, Softmaxes() as softmaxes:
        hooks.enter_context(model.blocks[0].register_forward_pre_hook(
            lambda block, inputs: stream.append(inputs[0][0])))
        for layer, block in enumerate(model.blocks, 1):
            hooks.enter_context(block.register_forward_hook(
                lambda block, inputs, out: stream.append(out[0])))
            heads = [head for number, head in off if number == layer]
            hooks.enter_context(attention(gpt, layer).proj.register_forward_pre_hook(
                partial(switch_off, heads, gpt.n_head)))
        logits = model(ids)[0][0]  # (T, vocab_size)
    lens = model.lm_head(model.ln_f(torch.stack(stream)))  # (n_layer + 1, T, vocab_size)
    of_softmaxes = [None] * 3
    if len(softmaxes.calls) == len(model.blocks):
        of_softmaxes = [torch.cat(tensors) for tensors in zip(*softmaxes.calls)]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction='none')  # (T - 1)
    return Seen(*of_softmaxes, lens, logits, losses)


def token_embeddings(gpt):
    """The vector of each character, (vocab_size, C)."""
    try:
        return gpt.model.token_embedding_table.weight.detach()
    except AttributeError as error:
        sys.exit(MISSING.format(error))
