"""What registration does to the process beside the hooks."""

from __future__ import annotations

import subprocess
import sys

import pytest

RAISES = """
import sys
sys.argv[0] = {program!r}
from sglang_cachedit_plugin import hooks, plugin
from sglang_cachedit_plugin.errors import RefusedError, SettingError
from sglang_cachedit_plugin.integration import startup
hooks.mismatches = lambda root: []
hooks.register = lambda *args: None
startup.read_settings = lambda: None
plugin.register()
raise {error}
"""
REFUSED = "RefusedError(SettingError('strict', True, 'cache_dit_params', 'the model cannot be cached'))"


@pytest.mark.parametrize(
    ("program", "error", "one_line"),
    [("/usr/bin/sglang", REFUSED, True), ("/usr/bin/sglang", "ValueError('other')", False), ("own.py", REFUSED, False)],
    ids=["refusal of the command line", "error of somebody else", "refusal in a script"],
)
def test_a_refusal_ends_the_hosts_command_line_in_one_line_and_nothing_else_does(program, error, one_line):
    code = RAISES.format(program=program, error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if not line.startswith("cache-dit: warning")]
    assert done.returncode == 1
    assert ("Traceback" not in done.stderr) is one_line
    assert not one_line or (len(said) == 1 and "strict = True (cache_dit_params)" in said[0]), said
