"""Nothing is lost: the best weights on disk, Ctrl-C, crashes, and talking to the model again."""
import os
import pty
import re
import signal
import time

import torch

from conftest import SMALL, load, put, run, start


def kept(folder):
    return torch.load(folder / 'gpt.pt', weights_only=True)


def test_gpt_pt_holds_the_weights_the_vocabulary_and_the_hyperparameters(tmp_path):
    out, err, status = run(put(tmp_path, 'gpt.py', **SMALL))
    assert (err, status) == ('', 0)
    saved = kept(tmp_path)
    gpt = load(tmp_path, 'gpt.py', **SMALL)
    assert set(saved) == {'model', 'config', 'chars'} and saved['chars'] == gpt.chars
    assert saved['config'] == {k: SMALL[k] for k in ('block_size', 'n_embd', 'n_head', 'n_layer')}
    gpt.model.load_state_dict(saved['model'])
    assert f'{gpt.estimate_loss()["val"]:.4f}, are in gpt.pt' in out
    assert sorted(os.listdir(tmp_path)) == ['__pycache__', 'gpt.pt', 'gpt.py', 'input.txt'] or \
        sorted(os.listdir(tmp_path)) == ['gpt.pt', 'gpt.py', 'input.txt']


def test_the_best_weights_are_kept_and_written_with_not_the_last(tmp_path):
    """What it learns of the first part, that a and b alternate, is ever less true of the last."""
    play = 'ab' * 450 + 'aabb' * 25
    out, _, status = run(put(tmp_path, 'gpt.py', play, **{
        **SMALL, 'max_iters': 60, 'eval_interval': 4, 'learning_rate': 0.02, 'top_k': 1}))
    losses = [float(loss) for loss in re.findall(r'step \d+: .*val loss (\d+\.\d+)', out)]
    assert status == 0 and min(losses[1:]) < losses[-1]
    gpt = load(tmp_path, 'gpt.py', play, **SMALL, top_k=1)
    gpt.model.load_state_dict(kept(tmp_path)['model'])
    assert abs(gpt.estimate_loss()['val'] - min(losses[1:])) < 1e-3
    text = gpt.decode(gpt.model.generate(torch.zeros(1, 1, dtype=torch.long), 500)[0].tolist())
    assert out.endswith(text + '\n')


def test_a_prompt_is_continued_without_training_though_input_txt_has_changed(tmp_path):
    script = put(tmp_path, 'gpt.py', **SMALL)
    run(script)
    before = (tmp_path / 'gpt.pt').read_bytes()
    for text in ('Something else, with other letters: \u00e9\u00e8\u00ea.', '!'):
        (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
        out, err, status = run(script, '--prompt', 'The king')
        assert (err, status) == ('', 0)
        assert out.startswith('The king') and len(out) == len('The king') + 500 + 1
        assert 'step' not in out and (tmp_path / 'gpt.pt').read_bytes() == before


def wait_for(process, words):
    """Reads what the process prints up to a line that starts with words."""
    for line in process.stdout:
        if line.startswith(words):
            return
    raise AssertionError(f'it ended without printing {words}: {process.stderr.read()}')


def test_ctrl_c_stops_training_and_writes_with_the_best_so_far(tmp_path):
    process = start(put(tmp_path, 'gpt.py', **{**SMALL, 'max_iters': 20_000}))
    wait_for(process, 'step 20:')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (err, process.returncode) == ('', 0)
    assert 'Stopped by Ctrl-C' in out
    assert len(out[out.index('They write:\n'):]) == len('They write:\n') + 1 + 500 + 1
    assert 'model' in kept(tmp_path)


def test_ctrl_c_before_anything_is_learned_keeps_an_earlier_model_and_shows_no_traceback(tmp_path):
    (tmp_path / 'gpt.pt').write_bytes(b'the model of an earlier run')
    process = start(put(tmp_path, 'gpt.py', **{
        **SMALL, 'max_iters': 20_000, 'eval_interval': 20_000}))
    wait_for(process, 'step 0:')
    wait_for(process, '    ')  # the sample: whatever step 0 might keep has been kept by then
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and len(err.splitlines()) == 1 and 'before the first' in err
    assert 'Stopped by Ctrl-C' in out and 'They write' not in out
    assert (tmp_path / 'gpt.pt').read_bytes() == b'the model of an earlier run'


def test_a_kill_at_any_moment_leaves_a_whole_gpt_pt_or_none(tmp_path):
    script = put(tmp_path, 'gpt.py', **{
        **SMALL, 'max_iters': 20_000, 'eval_interval': 1, 'eval_iters': 1})
    for pause in (0, 0.1, 0.4):
        process = start(script)
        wait_for(process, 'step 1:')
        time.sleep(pause)
        process.kill()
        process.communicate()
        if (tmp_path / 'gpt.pt').exists():
            assert set(kept(tmp_path)) == {'model', 'config', 'chars'}
    assert (tmp_path / 'gpt.pt').exists()


def test_a_disk_that_fills_up_midway_leaves_the_last_whole_model(tmp_path):
    """The second write fails: here because a folder has taken the half-written file's place."""
    gpt = load(tmp_path, 'gpt.py', **SMALL)
    gpt.save()
    gpt.unfinished.replace(gpt.kept)
    before = gpt.kept.read_bytes()
    gpt.unfinished.mkdir()
    try:
        gpt.save()
    except SystemExit as end:
        assert 'gpt.pt.tmp' in str(end)
    assert gpt.kept.read_bytes() == before


def test_a_progress_line_rewrites_itself_on_a_terminal_only(tmp_path):
    script = put(tmp_path, 'gpt.py', **SMALL)
    piped = start(script)
    ours, its = pty.openpty()
    process = start(script, stdout=its)
    os.close(its)
    seen = b''
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # how a terminal says that the other side has hung up
        pass
    process.communicate()
    assert b'step 7 of 20\r' in seen and 'step 7 of 20' not in piped.communicate()[0]
