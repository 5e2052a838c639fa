"""Reports on words whose tokens are known."""

import sys

_module = sys.modules["taca_pack.taca.report"]


def report_on(words, *whose):
    """A report on these words: word -> its tokens in the conditioning."""
    return _module.Report(lambda guider: _module.Asked(words, *whose))
