"""Loops of one process start their daemons at the same moment."""

import threading

import uvloop

from peers.hivemind_daemon import spawn

LOOPS, EACH = 4, 8


def test_loops_in_several_threads_start_processes_at_once() -> None:
    codes: list[int] = []
    errors: list[BaseException] = []
    together = threading.Barrier(LOOPS)

    async def start_some() -> None:
        together.wait()
        for _ in range(EACH):
            child = await spawn("true")
            codes.append(await child.wait())

    def work() -> None:
        try:
            uvloop.run(start_some())
        except RuntimeError as error:  # uvloop's, when loops race
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(LOOPS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert codes == [0] * LOOPS * EACH
