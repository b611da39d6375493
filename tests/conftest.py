"""Makes tests/helpers.py importable (pytest puts this file's folder on the path)."""

import logging
import signal

import pytest

# A shell or nohup may have it ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
LOGGER = logging.getLogger("torchrft")
PRISTINE = LOGGER.level, LOGGER.propagate


@pytest.fixture(autouse=True)
def pristine_logger():
    """A test that starts a job in this process sets up its log; the next one reads its own."""
    LOGGER.handlers.clear()
    LOGGER.setLevel(PRISTINE[0])
    LOGGER.propagate = PRISTINE[1]
