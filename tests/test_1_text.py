"""From a text to batches: the tokenizer, the two splits, inputs and targets."""
import string

import pytest
import torch

from conftest import TEXT, each_script, import_script


def test_a_token_is_a_character_and_its_id_the_place_in_the_sorted_vocabulary(module):
    assert module.text == TEXT
    assert module.chars == sorted(set(TEXT))
    assert module.encode(module.chars) == list(range(module.vocab_size))
    assert module.decode(module.encode(TEXT)) == TEXT
    with pytest.raises(KeyError):
        module.encode('あ')


@each_script
def test_a_text_too_short_for_one_held_out_sequence_is_refused(tmp_path, script):
    """A sequence takes block_size + 1 characters, here 17: the last tenth of 161 would have them.
    """
    with pytest.raises(AssertionError, match='more than 160 characters into input.txt'):
        import_script(tmp_path, script, TEXT[:160])


@each_script
@pytest.mark.parametrize('split, text', [
    ('train', string.ascii_letters[:46]), ('val', string.ascii_letters[46:])])
def test_batches_are_all_sequences_of_a_split_and_targets_the_characters_that_follow(
        tmp_path, script, split, text):
    """Nine tenths of the 52 letters, rounded down, are for training. No sequence goes across the
    border: a model may have memorised text that it was trained on.
    """
    module = import_script(tmp_path, script, string.ascii_letters, block_size=3, batch_size=500)
    x, y = module.get_batch(split)
    found = {(module.decode(inputs), module.decode(targets))
             for inputs, targets in zip(x.tolist(), y.tolist())}
    assert found == {(text[i:i + 3], text[i + 1:i + 4]) for i in range(len(text) - 3)}
    assert x.shape == y.shape == (500, 3)
    assert x.is_contiguous() and y.is_contiguous()  # so that view(B * T) works on them


def test_batches_are_random_and_a_generator_with_a_seed_repeats_them(module):
    first, second = module.get_batch('train')[0], module.get_batch('train')[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])  # each row starts elsewhere
    global_state = torch.get_rng_state()
    first, second = (module.get_batch('train', torch.Generator().manual_seed(3))[0]
                     for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), global_state)  # only the generator has moved on
