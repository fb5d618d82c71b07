"""exact_loss.py: the exact loss of models whose loss is known, and one line for each mistake."""
import math

import pytest
import torch

from conftest import SMALL_BIGRAM, TEXT, copy_script, exit_message, import_script, save
from exact_loss import exact_loss, main, ngram_loss, table_loss
from solutions import EXERCISES


@pytest.fixture
def losses_of(tmp_path, capsys):
    """The losses that exact_loss.py prints with these arguments."""
    def losses_of(*arguments):
        capsys.readouterr()
        main(list(map(str, arguments)), tmp_path)
        lines = [line.split(': ') for line in capsys.readouterr().out.splitlines()]
        assert lines[-1][0] == 'exact validation loss'
        return [float(loss) for _, loss in lines]
    return losses_of


class KnownLoss(torch.nn.Module):
    """Its loss for a character is the square of the character's token id."""
    def forward(self, x, y):
        assert not self.training and torch.equal(y, x + 1)
        assert x.shape[1] == 10 or x.shape == (1, 7)  # the last window is shorter
        return None, y.double().square().mean()


@pytest.mark.parametrize('length', [8, 11, 18, 651, 658, 2001])
def test_every_character_but_the_first_is_predicted_once_and_weighs_the_same(length):
    ids = torch.arange(length)  # the text is 0, 1, 2 and so on
    loss = exact_loss(KnownLoss().train(), ids, 10)
    assert loss == pytest.approx(sum(i * i for i in range(1, length)) / (length - 1))


def test_the_table_of_counts_plus_one():
    train, val = torch.tensor([0, 1, 0, 1, 0, 0]), torch.tensor([1, 0, 0, 1])
    # After 0 came 0 once and 1 twice, after 1 came 0 twice: with one more each, 2 3 and 3 1.
    assert table_loss(train, val, 2) == pytest.approx(-math.log(3 / 4 * 2 / 5 * 3 / 5) / 3)


def test_counts_of_pairs_by_hand():
    """'aab' has a twice, b once, and then aa and ab once each; c is new."""
    def discounted(count, total, kinds, shorter, discount=0.8):
        return (max(count - discount, 0) + discount * kinds * shorter) / total
    a, b, c = (discounted(count, 3, 2, 1 / 3) for count in (2, 1, 0))
    after_a = discounted(1, 2, 2, b)
    assert a + b + c == pytest.approx(1)
    # b follows a; c follows b, after which nothing was ever seen.
    assert ngram_loss('aab', 'abc', n=2) == pytest.approx(-(math.log(after_a) + math.log(c)) / 2)
    assert ngram_loss('aab', 'abc', n=1) == pytest.approx(-(math.log(b) + math.log(c)) / 2)


def test_bigram_trains_and_stands_beside_the_best_table(tmp_path, losses_of):
    copy_script(tmp_path, 'bigram.py', **SMALL_BIGRAM)
    table, exact = losses_of('bigram')
    assert 1 < table < exact < math.log(len(set(TEXT)))  # a few steps do not reach the table


def test_ngram_is_measured_on_the_last_tenth(tmp_path, losses_of):
    copy_script(tmp_path, 'bigram.py')
    cut = len(TEXT) * 9 // 10
    assert losses_of('ngram') == [round(ngram_loss(TEXT[:cut], TEXT[cut:]), 4)]


def test_a_model_is_measured_on_the_text_beside_it_which_must_be_the_one_it_was_trained_on(
        tmp_path, losses_of):
    """And with the sizes in its file."""
    other = tmp_path / 'other'
    gpt = import_script(other, 'gpt.py', TEXT[::-1], block_size=9, n_layer=1)
    path = save(gpt)
    import_script(other, 'gpt.py', TEXT[::-1])
    loss = round(exact_loss(gpt.model, gpt.val_data, 9), 4)
    assert losses_of('--checkpoint', other) == losses_of('--checkpoint', path) == [loss]
    assert 'no saved model' in exit_message(main, [], tmp_path)
    for text in (TEXT.replace('e', 'é'), TEXT[1:]):
        (other / 'input.txt').write_text(text, encoding='utf-8')
        message = exit_message(main, ['--checkpoint', str(path)], tmp_path)
        assert 'is not the text that the model was trained on' in message


def test_it_says_so_if_the_code_has_changed_since_the_model_was_saved(tmp_path, capsys):
    gpt = import_script(tmp_path, 'gpt.py', max_iters=10)
    gpt.train()
    main([], tmp_path)
    assert 'has changed' not in capsys.readouterr().err
    with open(tmp_path / 'gpt.py', 'a', encoding='utf-8') as script:
        script.write('\nBlock.forward = lambda self, x: x\n')
    main([], tmp_path)
    assert 'the code of gpt.py has changed since' in capsys.readouterr().err


def test_of_longer_tokens_the_loss_is_per_character_too(tmp_path, losses_of):
    gpt = import_script(tmp_path, 'gpt.py', TEXT, *EXERCISES[12].variants['300 pairs'].edits)
    for parameter in gpt.model.lm_head.parameters():
        parameter.data.zero_()  # equal logits: a loss of ln(vocab_size) per token
    save(gpt)
    tokens_per_character = len(gpt.val_data) / len(gpt.decode(gpt.val_data.tolist()))
    assert losses_of() == [pytest.approx(math.log(gpt.vocab_size) * tokens_per_character, abs=6e-5)]


def test_a_saved_model_is_not_measured_in_place_of_a_simpler_one(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['bigram', '--checkpoint', 'x'])
    assert '--checkpoint is for gpt.py, not for bigram' in capsys.readouterr().err
