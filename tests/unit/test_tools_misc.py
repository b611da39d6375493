import io
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch

from torchrft.tools import logging as tool_logging
from torchrft.tools.seeds import derive_seed, rng_state, seed_everything, set_rng_state
from torchrft.tools.signals import StopSignal


def test_derive_seed_is_fixed():
    assert derive_seed() == 8203414616412130826
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(42, 0, 1) == 3185412929265305880
    assert derive_seed(-1, 2**70) == 2244300071981286817


def test_derive_seed_depends_on_all_inputs_and_fits_63_bits():
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert max(seeds) > 2**62  # the upper bits are used


def _draw():
    return random.random(), np.random.rand(), torch.rand(3).tolist(), torch.randperm(5).tolist()


def test_seed_everything_repeats():
    seed_everything(derive_seed(7))
    first = _draw()
    seed_everything(derive_seed(7))
    assert _draw() == first
    seed_everything(8)
    assert _draw() != first


def test_rng_state_goes_on_where_it_was():
    seed_everything(3)
    _draw()
    random.gauss(0, 1)  # leaves a cached second value in Python's state
    state = rng_state()
    first = random.gauss(0, 1), _draw()
    seed_everything(99)
    set_rng_state(state)
    assert (random.gauss(0, 1), _draw()) == first


@pytest.fixture
def clean_logger():
    logger = tool_logging.logger
    saved = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:], logger.level = saved


def test_logging_shows_info_on_rank_0_and_marked_warnings_elsewhere(clean_logger, monkeypatch):
    for rank, expected in ((0, ["INFO hello", "WARNING careful"]), (2, ["[rank 2] careful"])):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        tool_logging.setup_logging(rank)
        tool_logging.setup_logging(rank)  # twice must not double the lines
        clean_logger.info("hello")
        clean_logger.warning("careful")
        lines = stream.getvalue().splitlines()
        assert len(lines) == len(expected)
        assert all(text in line for text, line in zip(expected, lines, strict=True))
        assert "\x1b" not in stream.getvalue()
    assert isinstance(clean_logger.handlers[0], logging.StreamHandler)


def test_stop_signal_sets_a_flag_and_restores_handlers(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo of the same key press
        time.sleep(0.01)
        assert stop.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    line = "rank 0: received SIGTERM, saving at the end of this step\n"
    assert capfd.readouterr().err == line


def test_second_ctrl_c_interrupts():
    code = """
        import os, signal, time
        from torchrft.tools.signals import StopSignal
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)
            print("still here", stop.received, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            print("too far")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "still here 2\n"
    assert "KeyboardInterrupt" in done.stderr


def test_remarks_of_libraries_that_ask_for_nothing_are_quiet(clean_logger, monkeypatch):
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    inductor = logging.getLogger("torch._inductor")
    level = inductor.level
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            tool_logging.setup_logging()
            warnings.warn("TensorFloat32 tensor cores for float32 …", UserWarning, stacklevel=1)
            warnings.warn("act on this", UserWarning, stacklevel=1)
            assert not logging.getLogger("torch._inductor.utils").isEnabledFor(logging.WARNING)
            inductor.setLevel(logging.NOTSET)
            monkeypatch.setenv("TORCH_LOGS", "+inductor")
            tool_logging.setup_logging()
            assert inductor.level == logging.NOTSET  # somebody wants to read it
    finally:
        inductor.setLevel(level)
    assert [str(warning.message) for warning in heard] == ["act on this"]
