"""Generation: how the next character is sampled, and from which context."""
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from conftest import SMALL_BIGRAM, import_script, randomize_, tokens


def frequencies_of_the_next_token(module, context):
    """How often each token follows the context (1, T) when generate samples it 20,000 times."""
    contexts = context.expand(20_000, -1)
    sampled = module.model.generate(contexts, max_new_tokens=1)[:, -1]
    return sampled.bincount(minlength=module.vocab_size) / len(sampled)


def test_m_is_a_short_name_of_the_model(module):
    assert module.m is module.model


def test_generate_appends_new_tokens_and_keeps_a_context_of_any_length(module):
    for length in range(1, 2 * module.block_size + 2):
        context = tokens(module, length)
        longer = module.model.generate(context, max_new_tokens=4)
        assert longer.shape == (3, length + 4)
        assert torch.equal(longer[:, :length], context)
        assert 0 <= longer.min() and longer.max() < module.vocab_size


@pytest.mark.parametrize('length', [3, 40])
def test_the_gpt_sees_the_last_block_size_tokens(gpt, length):
    """There is no position embedding for more, and the model has never seen a longer context."""
    contexts = []
    gpt.model.register_forward_pre_hook(lambda model, inputs: contexts.append(inputs[0]))
    result = gpt.model.generate(tokens(gpt, length), max_new_tokens=20)
    assert len(contexts) == 20
    for end, context in enumerate(contexts, start=length):
        assert torch.equal(context, result[:, max(0, end - gpt.block_size):end])


def test_the_gpt_continues_with_its_prediction_at_the_last_position(gpt):
    """With top_k = 1 nothing is random: every choice can be checked."""
    gpt.top_k = 1
    model = randomize_(gpt.model)
    result = model.generate(tokens(gpt, 4), max_new_tokens=12)
    most_probable = model(result)[0].argmax(dim=-1)
    assert torch.equal(result[:, 4:], most_probable[:, 3:-1])


def test_the_bigram_continues_the_last_character(tmp_path):
    """After this table, the only character that may follow is the next one of the vocabulary."""
    bigram = import_script(tmp_path, 'bigram.py', **SMALL_BIGRAM)
    one_later = torch.eye(bigram.vocab_size).roll(1, dims=1)
    bigram.model.token_embedding_table.weight.data = 1000 * one_later
    context = tokens(bigram, 4)
    result = bigram.model.generate(context, max_new_tokens=9)
    assert torch.equal(result[:, 3:], (context[:, 3:] + torch.arange(10)) % bigram.vocab_size)


def test_the_bigram_samples_with_the_probabilities_of_its_table(tmp_path):
    bigram = import_script(tmp_path, 'bigram.py', **SMALL_BIGRAM)
    table = nn.init.normal_(bigram.model.token_embedding_table.weight)
    context = tokens(bigram, 2, batch=1)
    frequencies = frequencies_of_the_next_token(bigram, context)
    assert_close(frequencies, table[context[0, -1]].softmax(dim=-1), rtol=0, atol=0.02)


@pytest.mark.parametrize('temperature', [0.5, 1, 3])
def test_the_gpt_samples_with_the_probabilities_of_logits_divided_by_temperature(gpt, temperature):
    """The value counts that temperature has by then: a notebook can change it."""
    gpt.temperature = temperature
    context = tokens(gpt, 2, batch=1)
    logits = randomize_(gpt.model)(context)[0][0, -1]
    frequencies = frequencies_of_the_next_token(gpt, context)
    assert_close(frequencies, (logits / temperature).softmax(dim=-1), rtol=0, atol=0.02)


def test_top_k_samples_from_the_k_most_probable_tokens_only(gpt):
    """Among those, the ratios of the probabilities stay as they were."""
    gpt.temperature, gpt.top_k = 1.0, 3
    context = tokens(gpt, 2, batch=1)
    probabilities = randomize_(gpt.model)(context)[0][0, -1].softmax(dim=-1)
    frequencies = frequencies_of_the_next_token(gpt, context)
    top = probabilities.topk(3)
    assert set(frequencies.nonzero()[:, 0].tolist()) == set(top.indices.tolist())
    assert_close(frequencies[top.indices], top.values / top.values.sum(), rtol=0, atol=0.02)


def test_top_k_keeps_all_tokens_that_are_as_probable_as_the_last_of_them(gpt):
    gpt.top_k = 3
    nn.init.zeros_(gpt.model.lm_head.weight)
    nn.init.zeros_(gpt.model.lm_head.bias)  # now all logits are 0
    frequencies = frequencies_of_the_next_token(gpt, tokens(gpt, 2, batch=1))
    assert_close(frequencies, torch.full_like(frequencies, 1 / gpt.vocab_size), rtol=0, atol=0.01)


def test_a_top_k_above_the_size_of_the_vocabulary_leaves_all_tokens(gpt):
    context = tokens(gpt, 2)
    torch.manual_seed(0)
    all_tokens = gpt.model.generate(context, max_new_tokens=50)
    gpt.top_k = gpt.vocab_size + 1
    torch.manual_seed(0)
    assert torch.equal(gpt.model.generate(context, max_new_tokens=50), all_tokens)


@pytest.mark.parametrize('training', [True, False])
def test_dropout_is_off_during_generation_and_then_as_it_was_before(gpt, training):
    modes = []
    gpt.model.train(training)
    gpt.model.register_forward_hook(lambda model, inputs, outputs: modes.append(model.training))
    gpt.model.generate(tokens(gpt, 2), max_new_tokens=3)
    assert modes == [False] * 3 and gpt.model.training == training


def test_generation_computes_no_gradients(module):
    needs_gradients = []
    module.model.register_forward_hook(
        lambda model, inputs, outputs: needs_gradients.append(outputs[0].requires_grad))
    module.model.generate(tokens(module, 2), max_new_tokens=3)
    assert needs_gradients == [False] * 3
