"""From a text to exercises: the tokenizer, the split, the batches."""
import pytest
import torch

from conftest import PLAY, SMALL, load


def test_decoding_undoes_encoding(either):
    assert either.decode(either.encode(PLAY)) == PLAY
    assert either.encode(either.decode(range(either.vocab_size))) == list(range(either.vocab_size))


def test_every_character_of_the_text_has_one_token(either):
    assert either.chars == sorted(set(PLAY))
    assert either.vocab_size == len(either.chars) == len(either.stoi) == len(either.itos)


def test_the_splits_are_the_first_nine_tenths_and_the_last_and_do_not_overlap(either):
    """A model that had trained on the text it is tested with could have learned it by heart."""
    assert len(either.train_data) == len(PLAY) * 9 // 10
    before, after = either.train_data.tolist(), either.val_data.tolist()
    assert either.decode(before) + either.decode(after) == PLAY


@pytest.mark.parametrize('split', ['train', 'val'])
def test_targets_are_the_inputs_moved_on_by_one_character(either, split):
    """What stands at y[b, t] is what the model must answer after reading x[b, :t + 1]."""
    x, y = either.get_batch(split)
    assert x.shape == y.shape == (either.batch_size, either.block_size)
    assert x.dtype == y.dtype == torch.long
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = either.decode((either.train_data if split == 'train' else either.val_data).tolist())
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert either.decode(inputs) + either.decode(targets[-1:]) in text


@pytest.mark.parametrize('script', ['bigram.py', 'gpt.py'])
def test_batches_reach_the_end_of_the_split_and_never_cross_it(tmp_path, script):
    """20 letters for training and 20 - 18 = 2 for validation leave one piece of length 1 + 1."""
    text = 'abcdefghijklmnopqrst'
    small = SMALL if script == 'gpt.py' else {}
    module = load(tmp_path, script, text, **{**small, 'block_size': 1, 'batch_size': 300})
    x, y = module.get_batch('val')
    assert set(module.decode(x[:, 0].tolist())) == {'s'}
    assert set(module.decode(y[:, 0].tolist())) == {'t'}
    x, y = module.get_batch('train')
    assert set(module.decode(x[:, 0].tolist())) == set('abcdefghijklmnopq')
    assert set(module.decode(y[:, 0].tolist())) == set('bcdefghijklmnopqr')


def test_windows_line_ends_and_a_byte_order_mark_do_not_become_tokens(tmp_path):
    module = load(tmp_path, 'bigram.py', b'\xef\xbb\xbfone\r\ntwo\r\n')
    assert module.text == 'one\ntwo\n'
