"""A process that holds the model and answers batches, and the one that it is forked from.

Here        main: `python -m dougong.serve.worker FD`; serve_batches.
Elsewhere   who starts it and asks it (workers.py); the model (backend.py).
Promise     the model is loaded and its sums are checked once, before any worker is forked: workers share its weights'
            memory, and one that was killed is replaced within a moment. When the server is gone, so are they.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from dougong.core.errors import DougongError
from dougong.serve.backend import Backend, BackendMaker, Outcome, answer_batch, from_bundle
from dougong.serve.wire import Frames, pack

PIECE: Final = 2**18
LOOK_SECONDS: Final = 1.0
"""Between two records whose media's quality is measured, so that a drift of it is seen and costs nothing."""


def main(arguments: list[str] | None = None, make: BackendMaker = from_bundle) -> int:
    """Be the process that workers are forked from: the socket's number is the one argument.

    It computes nothing itself: libraries that keep threads do not outlive a fork.
    """
    given = sys.argv[1:] if arguments is None else arguments
    server = socket.socket(fileno=int(given[0]))
    # Meant for the server, where they go to all of a group: it answers what has come, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the system buries them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    frames, backend = Frames(), None
    threads = 1
    while True:
        data, sent, _, _ = socket.recv_fds(server, PIECE, 1)
        if not data:
            return 0
        for frame in frames.feed(data):
            if frame["kind"] == "load":
                threads = int(frame["settings"].get("threads", 1))
                try:
                    backend = make(frame["settings"])
                except DougongError as error:
                    server.sendall(pack({"kind": "refused", "error": str(error)}))
                    return 2
                # Else each worker's collector would write into every object that it looks at, and so copy the page.
                gc.collect()
                gc.freeze()
                server.sendall(pack({"kind": "loaded"}))
            elif frame["kind"] == "fork":
                assert backend is not None
                assert len(sent) == 1
                child = os.fork()
                if child == 0:
                    server.close()
                    _be_a_worker(socket.socket(fileno=sent[0]), backend, threads)
                os.close(sent[0])


def _be_a_worker(server: socket.socket, backend: Backend, threads: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        serve_batches(server, backend)
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the server is gone
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # nothing of the parent's is to be closed or flushed twice


def serve_batches(server: socket.socket, backend: Backend) -> None:
    """Answer until the other end closes. The first frame sent says that the model is warm."""
    backend.warm()
    server.sendall(pack({"kind": "ready", "pid": os.getpid()}))
    frames = Frames()
    looked_at = 0.0
    while data := server.recv(PIECE):
        for frame in frames.feed(data):
            if frame["kind"] == "write":
                _write(server, backend, frame)
                continue
            started = time.perf_counter()
            if frame["kind"] == "explain":
                outcomes = [_explained(backend, frame["records"][0])]
            elif frame["kind"] == "draw":
                outcomes = [draw(backend, frame["records"][0], frame["options"])]
            else:
                outcomes = answer_batch(backend, frame["records"])
            seconds = time.perf_counter() - started
            quality: Mapping[str, float] = {}
            if started - looked_at > LOOK_SECONDS and outcomes[0].status == 200 and frame["kind"] != "draw":
                looked_at = started
                quality = backend.quality(frame["records"][0])
            answers = {
                "kind": "answers",
                "seconds": seconds,
                "quality": quality,
                "statuses": [outcome.status for outcome in outcomes],
                "sizes": [len(outcome.body) for outcome in outcomes],
                "bodies": b"".join([outcome.body for outcome in outcomes]),  # one piece: each costs where it is cut
            }
            server.sendall(pack(answers))


def draw(backend: Backend, record: Mapping[str, Any], options: Mapping[str, Any]) -> Outcome:
    """A picture of the record's `text`."""
    try:
        return backend.draw(record["text"], options)
    except Exception as error:
        return Outcome(500, b'{"error":"the model failed on this text (%s)"}' % type(error).__name__.encode())


def _explained(backend: Backend, record: Mapping[str, Any]) -> Outcome:
    try:
        return backend.explain(record)
    except Exception as error:
        return Outcome(500, b'{"error":"the model failed on this record (%s)"}' % type(error).__name__.encode())


def _write(server: socket.socket, backend: Backend, frame: Mapping[str, Any]) -> None:
    try:
        for piece in backend.write(frame["records"][0], frame.get("options", {})):
            server.sendall(pack({"kind": "words", "text": piece}))
        end = {"kind": "written", "error": None}
    except DougongError as error:
        end = {"kind": "written", "error": str(error)}
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        end = {"kind": "written", "error": f"the model failed on this record ({type(error).__name__})", "status": "500"}
    server.sendall(pack(end))


if __name__ == "__main__":
    sys.exit(main())
