"""input.txt: plays in the layout and the alphabet of the classic corpus, and few repeats."""
import re
import string
from collections import Counter

from committed import RAW, needs_committed_text

pytestmark = needs_committed_text
TEXT = RAW.decode('utf-8', errors='replace')
SPEECHES = TEXT.rstrip('\n').split('\n\n')


def test_its_alphabet_is_the_classic_one():
    """The same 65 characters, so that every character has the same token id in both corpora."""
    assert sorted(set(TEXT)) == sorted("\n !$&',-.3:;?" + string.ascii_letters)


def test_it_is_about_as_long_as_the_classic():
    assert 1_000_000 <= len(TEXT) <= 1_200_000


def test_lines_end_in_a_newline_and_so_does_the_file():
    assert b'\r' not in RAW and TEXT.endswith('\n') and not TEXT.endswith('\n\n')


def test_a_speech_is_a_name_with_a_colon_and_lines_below_it():
    """No headings, no stage directions, no notes, one blank line between speeches."""
    for speech in SPEECHES:
        name, *lines = speech.split('\n')
        assert re.fullmatch(r"[A-Z][A-Za-z ,'-]*:", name), speech
        assert lines, speech
        assert all(line and line == line.strip() and len(line) <= 70 for line in lines), speech


def test_many_people_speak_and_the_last_tenth_knows_them_all():
    """Validation text about strangers would measure the plot, not the model."""
    boundary = len(SPEECHES) * 9 // 10
    before, after = [{speech.split(':')[0] for speech in part}
                     for part in (SPEECHES[:boundary], SPEECHES[boundary:])]
    assert len(before) > 150
    assert len(after - before) < 0.1 * len(after)


def test_little_is_said_twice():
    lines = [line for line in TEXT.split('\n') if len(line) >= 25]
    assert len(set(lines)) > 0.997 * len(lines)
    windows = Counter(TEXT[i:i + 40] for i in range(len(TEXT) - 40))
    assert sum(n for n in windows.values() if n > 1) < 0.01 * len(TEXT)
