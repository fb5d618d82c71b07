"""Whether input.txt is the text that came with the project: some tests are about it alone."""
import hashlib

import pytest

from conftest import PROJECT

SHA256 = '93625df78106d28c793ea8d86dd7cb50598461970a20182e5b1a4cc705422dbc'
RAW = (PROJECT / 'input.txt').read_bytes()
needs_committed_text = pytest.mark.skipif(
    hashlib.sha256(RAW.replace(b'\r\n', b'\n')).hexdigest() != SHA256,
    reason='input.txt is another text than the one that came with the project')
