"""tests/attention.py: its pictures show what the model's attention really does."""
import io
import math
import shutil
import sys

import pytest
import torch

import attention
from conftest import PROJECT, SMALL, import_script, randomize_, run

NAME = 'attention.py'


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with a small gpt.py, whose saved weights are random; attention.py looks there."""
    gpt = import_script(tmp_path, 'gpt.py', **SMALL)
    torch.manual_seed(1)
    randomize_(gpt.model)
    gpt.save()
    monkeypatch.setattr(attention, 'PROJECT', tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # main sets another
    monkeypatch.setenv('COLUMNS', '80')
    return gpt


def show(monkeypatch, *arguments, encoding='utf-8'):
    """What attention.py prints in a terminal of this encoding, as lines."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', [NAME, *arguments])
        patch.setattr(sys, 'stdout', out)
        attention.main()
    out.flush()
    return out.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize('fused', [True, False])
def test_the_weights_shown_give_the_output_of_the_models_attention(trained, fused):
    trained.fused_attention = fused
    sa, x = trained.model.blocks[0].sa.eval(), torch.randn(2, 11, trained.n_embd)
    att, v = attention.attention_weights(sa, x)
    out = (att @ v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(sa.proj(out), sa(x))


def test_the_weights_are_those_of_every_layer_in_its_place(trained):
    idx = torch.randint(trained.vocab_size, (2, 9))
    seen = attention.look(trained.model, idx)
    model, x = trained.model, trained.model.token_embedding_table(idx)
    x = x + model.position_embedding_table(torch.arange(9))
    for att, block in zip(seen, model.blocks, strict=True):
        torch.testing.assert_close(att, attention.attention_weights(block.sa, block.ln1(x))[0])
        x = block(x)
    assert not any(block.sa._forward_pre_hooks for block in model.blocks)


STRING = "ab\n\nAnn:\ncd ef\nghijklmn"
ROWS = range(len(STRING) // 2, len(STRING))


def weights_on(column_of):
    """Weights (1, 1, T, T) where each row has all its weight on one column."""
    att = torch.zeros(1, 1, len(STRING), len(STRING))
    for row in range(len(STRING)):
        att[0, 0, row, column_of(row)] = 1
    return {name: value.item() for name, value in attention.figures(att, [STRING]).items()}


def test_a_head_that_reads_the_previous_character():
    got = weights_on(lambda row: max(row - 1, 0))
    assert (got['distance'], got['previous'], got['itself'], got['entropy']) == (1, 1, 0, 0)
    assert got['position'] == pytest.approx(1)


def test_a_head_that_reads_itself():
    got = weights_on(lambda row: row)
    assert (got['distance'], got['previous'], got['itself']) == (0, 0, 1)


@pytest.mark.parametrize('offset', [0, 1])
def test_a_head_that_reads_the_start_of_the_line(offset):
    got = weights_on(lambda row: STRING.rfind('\n', 0, row) + offset if row > 2 else 0)
    assert got['line'] == 1
    assert got['position'] < 0.9  # the distance changes from row to row


@pytest.mark.parametrize('offset', [0, 1, 2])
def test_a_head_that_reads_the_start_of_the_speech(offset):
    got = weights_on(lambda row: STRING.index('\n\n') + offset if row > 4 else 0)
    assert (got['speech'], got['line']) == (1, 0)


def test_a_head_that_reads_elsewhere_has_no_share_of_the_starts():
    got = weights_on(lambda row: 0)
    assert (got['speech'], got['line'], got['distance']) == (0, 0, sum(ROWS) / len(ROWS))


def test_a_head_with_equal_weights():
    T = len(STRING)
    att = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    got = attention.figures(att[None, None], [STRING])
    assert got['entropy'].item() == pytest.approx(
        sum(math.log(row + 1) for row in ROWS) / len(ROWS))
    assert got['position'].item() > 0.95


def test_a_picture_is_a_triangle_whose_light_cells_stay_visible():
    att = torch.tensor([[1.0, 0, 0], [0.01, 0.99, 0], [0.5, 0.3, 0.2]])
    assert attention.picture(att, 'abc', '', '01234') == [
        '     ', '  abc', 'a 4  ', 'b 04 ', 'c 322']


def test_each_character_of_the_text_has_a_row_and_a_column(trained, monkeypatch):
    lines = show(monkeypatch, 'He is\n', '--layer', '2', '--head', '1')
    assert lines[:2] == ['layer 2, head 1', '  He_is↵']
    assert [line[:2] for line in lines[2:8]] == ['H ', 'e ', '_ ', 'i ', 's ', '↵ ']
    assert all(set(line[2:].rstrip()) <= set(attention.SHADES) for line in lines[2:8])
    assert sum(line.startswith('layer ') and 'head ' in line for line in lines) == 2  # and figures


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_terminal_without_shades_gets_ascii(trained, monkeypatch, encoding):
    lines = show(monkeypatch, 'He is\n', encoding=encoding)
    assert '\n'.join(lines).isascii() and '?' not in '\n'.join(lines)
    assert '  He_is/' in lines[1]


@pytest.mark.parametrize('columns, titles', [('80', 2), ('31', 1), ('20', 1), ('32', 2)])
def test_the_heads_of_a_layer_stand_side_by_side_as_far_as_they_fit(
        trained, monkeypatch, columns, titles):
    monkeypatch.setenv('COLUMNS', columns)
    lines = show(monkeypatch, 'He is')
    lines = lines[:next(i for i, line in enumerate(lines) if line.startswith('Weights'))]
    assert max(map(len, lines)) <= int(columns)
    assert lines[0].count('layer') == titles
    assert '\n'.join(lines).count('layer') == trained.n_layer * trained.n_head


def test_without_a_text_it_shows_some_of_the_validation_text(trained, monkeypatch):
    lines = show(monkeypatch)
    text = lines[1].split()[0].replace('_', ' ').replace('↵', '\n')
    assert text in trained.decode(trained.val_data.tolist())
    assert max(map(len, lines)) <= 80
    table = lines[next(i for i, line in enumerate(lines) if line.startswith('layer head')) + 1:]
    assert [line.split()[:2] for line in table] == [
        [str(layer), str(head)] for layer in (1, 2) for head in (1, 2)]


def test_nearest_sorts_the_other_characters_by_cosine(trained, monkeypatch):
    table = trained.model.token_embedding_table.weight.data
    e, x = trained.stoi['e'], trained.stoi['x']
    table[x] = 3 * table[e]
    trained.save()
    heading, *lines = show(monkeypatch, '--nearest', 'e')
    assert heading == 'cosine similarity with e:' and lines[0] == 'x 1.00'
    cosines = [float(line.split()[1]) for line in lines]
    assert cosines == sorted(cosines, reverse=True) and len(lines) == 10


@pytest.mark.parametrize('arguments, message', [
    (['He €'], "never saw these characters: leave out ['€']"),
    ([''], 'no text'),
    (['a' * 17], 'at most block_size = 16'),
    (['--layer', '3'], '--layer is a number from 1 to 2'),
    (['--layer', '0'], '--layer is a number from 1 to 2'),
    (['--head', '3'], '--head is a number from 1 to 2'),
    (['--nearest', '€'], "'€' is not one of the characters"),
    (['--nearest', 'ab'], "'ab' is not one of the characters"),
])
def test_a_mistake_gets_one_line(trained, monkeypatch, arguments, message):
    with pytest.raises(SystemExit) as stop:
        show(monkeypatch, *arguments)
    assert message in stop.value.code and '\n' not in stop.value.code


def test_a_text_wider_than_the_terminal_gets_one_line(trained, monkeypatch):
    monkeypatch.setenv('COLUMNS', '12')
    with pytest.raises(SystemExit, match='a terminal 13 columns wide: this one has 12'):
        show(monkeypatch, 'a' * 11)


def test_without_a_trained_model_it_says_what_to_do(tmp_path):
    (tmp_path / 'tests').mkdir()
    shutil.copy(PROJECT / 'tests' / NAME, tmp_path / 'tests')
    out, err, status = run(tmp_path / 'tests' / NAME)
    assert (out, err, status) == (
        '', f'{NAME}: there is no gpt.pt yet: run python gpt.py first\n', 1)
