"""The script of a worker of `pool.py`: one process with one engine, which answers one job after the other.

Run as a script, `python -P worker.py FD PARENT_PID ENGINE_FILE OPTIONS_JSON`, so that it imports neither the caller's
main module nor torch: it starts in the time its engine takes. Messages are JSON and raw array bytes, never pickles.
ENGINE_FILE defines `Engine(**options)`, a callable (header, array) -> (header, array).
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


def send(connection: Connection, header: dict[str, Any], array: np.ndarray) -> None:
    """One message: a JSON header and an array."""
    form = {"header": header, "shape": array.shape, "dtype": array.dtype.str}
    connection.send_bytes(json.dumps(form).encode())
    connection.send_bytes(np.ascontiguousarray(array).tobytes())


def receive(connection: Connection) -> tuple[dict[str, Any], np.ndarray]:
    """A message of `send`. EOFError when the other side is gone."""
    form = json.loads(connection.recv_bytes())
    array = np.frombuffer(connection.recv_bytes(), dtype=form["dtype"]).reshape(form["shape"])
    return form["header"], array


def leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, however that ended and whatever the engine is doing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def serve(connection: Connection, engine_file: str, options: dict[str, Any]) -> None:
    """Builds the engine, sends an empty message when it is ready, then answers jobs until the caller closes the connection."""
    nothing = np.zeros(0, dtype=np.float32)
    try:
        engine = runpy.run_path(engine_file)["Engine"](**options)
        send(connection, {}, nothing)
        while True:
            try:
                header, array = receive(connection)
            except (EOFError, ConnectionError):
                return
            send(connection, *engine(header, array))
    except Exception:
        send(connection, {"error": traceback.format_exc()}, nothing)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the parent decides when to stop
        signal.signal(number, signal.SIG_IGN)
    file_descriptor, parent_pid, engine_path, options_json = sys.argv[1:]
    threading.Thread(target=leave_with, args=(int(parent_pid),), daemon=True).start()
    serve(Connection(int(file_descriptor)), engine_path, json.loads(options_json))
