"""From a text to batches: the tokenizer, the two splits, inputs and targets."""
import pytest
import torch
import torch.nn.functional as F

from conftest import SMALL_OF, TEXT, each_script, import_script


def test_decoding_undoes_encoding(module):
    assert module.decode(module.encode(TEXT)) == TEXT
    every_id = list(range(module.vocab_size))
    assert module.encode(module.decode(every_id)) == every_id


def test_the_vocabulary_holds_each_character_of_the_text_once(module):
    assert module.text == TEXT
    assert module.chars == sorted(set(TEXT))
    assert module.vocab_size == len(module.chars) == len(module.stoi)


def test_a_character_that_the_text_does_not_have_has_no_token(module):
    with pytest.raises(KeyError):
        module.encode('あ')


@each_script
@pytest.mark.parametrize('length', [11, 15, 20, 8000])
def test_the_first_nine_tenths_are_for_training_and_the_rest_is_held_out(tmp_path, script, length):
    """The splits do not overlap: a model may have memorised text that it was trained on. If ten
    does not divide the length, the held-out part is rounded up.
    """
    module = import_script(tmp_path, script, TEXT[:length], **{**SMALL_OF[script], 'block_size': 1})
    assert len(module.train_data) == length * 9 // 10
    train_text = module.decode(module.train_data.tolist())
    val_text = module.decode(module.val_data.tolist())
    assert train_text + val_text == TEXT[:length]


@each_script
def test_a_text_too_short_for_one_held_out_sequence_is_refused(tmp_path, script):
    """A sequence takes block_size + 1 characters, here 17: the last tenth of 161 has just that."""
    with pytest.raises(AssertionError, match='more than 160 characters into input.txt'):
        import_script(tmp_path, script, TEXT[:160], **SMALL_OF[script])
    module = import_script(tmp_path, script, TEXT[:161], **SMALL_OF[script])
    assert module.get_batch('val')[0].shape == (4, 16)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_targets_are_the_inputs_shifted_by_one(module, split):
    """y[b, t] is the character that the model should predict after it has read x[b, :t + 1]."""
    x, y = module.get_batch(split)
    assert x.shape == y.shape == (module.batch_size, module.block_size)
    assert x.dtype == y.dtype == torch.long
    assert torch.equal(x[:, 1:], y[:, :-1])
    data = {'train': module.train_data, 'val': module.val_data}[split]
    split_text = module.decode(data.tolist())
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert module.decode(inputs) + module.decode(targets[-1:]) in split_text


@each_script
def test_batches_reach_the_end_of_their_split_and_never_cross_it(tmp_path, script):
    """Of these 20 letters, 18 are for training, and the last two make the only 'val' sequence."""
    hyperparameters = {**SMALL_OF[script], 'block_size': 1, 'batch_size': 300}
    module = import_script(tmp_path, script, 'abcdefghijklmnopqrst', **hyperparameters)
    x, y = module.get_batch('val')
    assert set(module.decode(x[:, 0].tolist())) == {'s'}
    assert set(module.decode(y[:, 0].tolist())) == {'t'}
    x, y = module.get_batch('train')
    assert set(module.decode(x[:, 0].tolist())) == set('abcdefghijklmnopq')
    assert set(module.decode(y[:, 0].tolist())) == set('bcdefghijklmnopqr')


def test_batches_are_random_and_a_generator_with_a_seed_repeats_them(module):
    first, second = module.get_batch('train')[0], module.get_batch('train')[0]
    assert not torch.equal(first, second)  # the next batch is another one
    assert not torch.equal(first[0], first[1])  # and each of its rows starts elsewhere
    global_state = torch.get_rng_state()
    first = module.get_batch('train', torch.Generator().manual_seed(3))[0]
    second = module.get_batch('train', torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), global_state)  # only the generator has moved on


def test_batches_are_contiguous_so_that_view_works_on_them(module):
    """Much code for this lesson uses view(B * T) on a batch. It needs contiguous memory."""
    x, targets = module.get_batch('train')
    assert x.is_contiguous() and targets.is_contiguous()
    logits, loss = module.m(x, targets)
    B, T, C = logits.shape
    assert torch.equal(F.cross_entropy(logits.view(B * T, C), targets.view(B * T)), loss)


@each_script
def test_windows_line_ends_and_a_byte_order_mark_do_not_become_tokens(tmp_path, script):
    text = b'\xef\xbb\xbf' + 40 * b'one\r\ntwo\r\n'
    module = import_script(tmp_path, script, text, **SMALL_OF[script])
    assert module.text == 40 * 'one\ntwo\n'
