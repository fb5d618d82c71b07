"""Generation: how the next character is sampled, and from which context."""
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from conftest import import_script, tokens


def spread_logits(model, std):
    """Random weights for the output layer of the GPT, or for the table of the bigram model."""
    for parameter in list(model.parameters())[-2:]:
        nn.init.normal_(parameter, std=std)


def frequencies_of_the_next_token(module, context):
    """How often each token follows the context (1, T) when generate samples it 20,000 times."""
    contexts = context.expand(20_000, -1)
    sampled = module.m.generate(contexts, max_new_tokens=1)[:, -1]
    return sampled.bincount(minlength=module.vocab_size) / len(sampled)


def test_each_new_token_follows_from_the_last_block_size_tokens_before_it(module):
    """There is no position embedding for more. These logits differ so much that the most probable
    token is certain: each choice can be checked.
    """
    spread_logits(module.model, std=1e6)
    context = tokens(module, 3, batch=20)
    result = module.m.generate(context, max_new_tokens=40)
    assert result.shape == (20, 43) and torch.equal(result[:, :3], context)
    for end in range(3, 43):
        logits, _ = module.model(result[:, max(0, end - module.block_size):end])
        assert torch.equal(result[:, end], logits[:, -1].argmax(dim=-1))


@pytest.mark.parametrize('script, temperature, top_k', [
    ('bigram.py', 1, None), ('gpt.py', 0.5, None), ('gpt.py', 3, None), ('gpt.py', 2, 3),
    ('gpt.py', 1, 1000)])
def test_a_token_is_sampled_with_its_probability(tmp_path, script, temperature, top_k):
    """That is softmax(logits / temperature), or, of the top_k most probable tokens only, their
    shares in it; the values count that the two have by then: a notebook can change them.
    """
    module = import_script(tmp_path, script)
    module.temperature, module.top_k = temperature, top_k
    context = tokens(module, 2, batch=1)
    spread_logits(module.model, std=1)
    logits = module.model(context)[0][0, -1]
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_k:
        probabilities[probabilities.argsort(descending=True)[top_k:]] = 0
    frequencies = frequencies_of_the_next_token(module, context)
    assert_close(frequencies, probabilities / probabilities.sum(), rtol=0, atol=0.02)
    assert torch.all(frequencies[probabilities == 0] == 0)


def test_top_k_keeps_all_tokens_that_are_as_probable_as_the_last_of_them(gpt):
    gpt.top_k = 3
    nn.init.zeros_(gpt.model.lm_head.weight)
    nn.init.zeros_(gpt.model.lm_head.bias)  # now all logits are 0
    frequencies = frequencies_of_the_next_token(gpt, tokens(gpt, 2, batch=1))
    assert_close(frequencies, torch.full_like(frequencies, 1 / gpt.vocab_size), rtol=0, atol=0.01)


@pytest.mark.parametrize('training', [True, False])
def test_generation_computes_no_gradients_and_leaves_the_mode_as_it_was(module, training):
    calls = []
    module.model.train(training)
    module.model.register_forward_hook(lambda model, inputs, outputs: calls.append(
        (outputs[0].requires_grad, model.training)))
    module.model.generate(tokens(module, 2), max_new_tokens=3)
    mode = training and not hasattr(module, 'dropout')  # which is off meanwhile, if there is any
    assert calls == [(False, mode)] * 3 and module.model.training == training
