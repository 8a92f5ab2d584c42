import os
import signal
import threading

import pytest

from dougong.engine.interrupt import interruptible


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_is_noted_and_harms_nothing() -> None:
    with interruptible() as interruption:
        assert not interruption.wanted
        press()
        assert interruption.wanted


def test_the_second_ctrl_c_stops_at_once() -> None:
    def press_twice() -> None:
        with interruptible():
            press()
            press()

    with pytest.raises(KeyboardInterrupt):
        press_twice()


@pytest.mark.parametrize("pressed", [False, True])
def test_after_it_ctrl_c_is_as_before(pressed: bool) -> None:
    heard: list[int] = []
    own = lambda number, frame: heard.append(number)  # noqa: E731
    before = signal.signal(signal.SIGINT, own)
    try:
        with interruptible():
            if pressed:
                press()
        assert signal.getsignal(signal.SIGINT) is own
        press()
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_does_nothing() -> None:
    found: list[bool] = []

    def work() -> None:
        with interruptible() as interruption:
            found.append(interruption.wanted)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert found == [False]
