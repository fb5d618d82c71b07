"""Writing: how a next character is chosen, and where from."""
import pytest
import torch

from test_2_model import stir, tokens


def test_generate_appends_and_leaves_what_it_was_given(either):
    given = tokens(either, 5)
    longer = either.model.generate(given, max_new_tokens=30)
    assert longer.shape == (3, 35) and torch.equal(longer[:, :5], given)


def test_generate_feeds_the_last_block_size_tokens_and_never_more(either):
    """Beyond that there is no position embedding; and no longer piece was ever trained on."""
    fed = []
    either.model.register_forward_pre_hook(lambda model, args: fed.append(args[0]))
    text = either.model.generate(tokens(either, 3), max_new_tokens=20)
    assert len(fed) == 20
    for end, piece in enumerate(fed, start=3):
        assert torch.equal(piece, text[:, max(0, end - either.block_size):end])


def test_generate_writes_what_the_last_position_predicts(gpt):
    """With the likeliest character only, nothing random is left: each choice can be checked."""
    model = stir(gpt.model).eval()
    text = model.generate(tokens(gpt, 1), max_new_tokens=14, top_k=1)
    assert torch.equal(model(text)[0].argmax(dim=-1)[:, :-1], text[:, 1:])


def test_generate_draws_with_the_models_probabilities(either):
    context = tokens(either, 1, batch=1)
    probabilities = stir(either.model).eval()(context)[0][0, -1].softmax(dim=-1)
    options = {'temperature': 1.0} if hasattr(either, 'temperature') else {}
    drawn = either.model.generate(context.expand(20_000, 1), max_new_tokens=1, **options)[:, 1]
    frequencies = drawn.bincount(minlength=either.vocab_size) / len(drawn)
    assert torch.allclose(frequencies, probabilities, atol=0.02)


def test_temperature_divides_the_logits_before_softmax(gpt):
    context = tokens(gpt, 1, batch=1)
    logits = stir(gpt.model).eval()(context)[0][0, -1]
    drawn = gpt.model.generate(context.expand(20_000, 1), max_new_tokens=1, temperature=3.0)[:, 1]
    frequencies = drawn.bincount(minlength=gpt.vocab_size) / len(drawn)
    assert torch.allclose(frequencies, (logits / 3.0).softmax(dim=-1), atol=0.02)


def test_top_k_leaves_the_k_likeliest(gpt):
    context = tokens(gpt, 1, batch=1)
    likeliest = stir(gpt.model).eval()(context)[0][0, -1].topk(3).indices
    drawn = gpt.model.generate(context.expand(500, 1), max_new_tokens=1, temperature=50.0, top_k=3)
    assert set(drawn[:, 1].tolist()) == set(likeliest.tolist())
    gpt.model.generate(context, max_new_tokens=1, top_k=gpt.vocab_size + 1)


@pytest.mark.parametrize('mode', [True, False])
def test_generate_restores_the_mode_that_it_found(either, mode):
    either.model.train(mode)
    either.model.generate(tokens(either, 2), max_new_tokens=2)
    assert either.model.training is mode


def test_dropout_is_off_and_no_gradients_are_kept_in_generate(gpt):
    modes = []
    gpt.model.register_forward_hook(
        lambda model, args, out: modes.append((model.training, out[0].requires_grad)))
    gpt.model.train().generate(tokens(gpt, 2), max_new_tokens=3)
    assert modes == [(False, False)] * 3
