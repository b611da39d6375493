"""Makes tests/helpers.py importable (pytest puts this file's folder on the path)."""

import logging
import os
import signal

import pytest

# A shell or nohup may have it ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
LOGGER = logging.getLogger("torchrft")
PRISTINE = LOGGER.level, LOGGER.propagate


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest` alone leaves out slow tests, and shares whole files out to a process a core.

    Tests of a file share runs. `pytest tests`, or any other path, runs all tests in this process.
    """
    is_worker, by_default = hasattr(config, "workerinput"), config.ArgsSource.TESTPATHS
    if is_worker or config.args_source is not by_default:
        return
    config.option.markexpr = config.option.markexpr or "not slow"
    if getattr(config.option, "numprocesses", 0) is None:  # pytest-xdist is there, and not told
        config.option.numprocesses, config.option.dist = os.cpu_count(), "loadfile"


@pytest.fixture(autouse=True)
def pristine_logger():
    """A test that starts a job in this process sets up its log; the next one reads its own."""
    LOGGER.handlers.clear()
    LOGGER.setLevel(PRISTINE[0])
    LOGGER.propagate = PRISTINE[1]
