"""Words of a variable: what the host reads as true and false is true and false here."""

from __future__ import annotations

import pytest
from sglang.multimodal_gen import envs

from sglang_cachedit_plugin.config.sources import ENABLED_VARIABLE, read_environment
from sglang_cachedit_plugin.errors import SettingError

WORDS = ["1", "true", "TRUE", "yes", "y", "t", "T", " on ", "0", "false", "no", "n", "f", "off", "F", "", " "]


@pytest.mark.parametrize("word", WORDS)
def test_a_switch_in_the_hosts_words_is_read_as_the_host_reads_it(word, monkeypatch):
    monkeypatch.setenv(ENABLED_VARIABLE, word)
    enabled = read_environment({ENABLED_VARIABLE: word})[0].enabled
    assert (enabled is not None and enabled.value) == envs.SGLANG_CACHE_DIT_ENABLED


@pytest.mark.parametrize("word", ["maybe", "tru", "2", "enabled", "null"])
def test_a_word_that_the_host_only_warns_of_is_refused(word):
    with pytest.raises(SettingError, match=f"{ENABLED_VARIABLE} = '{word}' "):
        read_environment({ENABLED_VARIABLE: word})
