"""Serves one node of the demo. `pgchannels demo` starts it; by hand, use `uvicorn app:app`.

    python node.py <port>

Its stdin is a pipe that the supervisor holds open and never writes to. When the supervisor is gone,
however it went, the pipe ends, and so does the node.
"""

import logging
import os
import sys
import threading

import uvicorn


def end_with_supervisor() -> None:
    # Not sys.stdin, whose lock a daemon thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    name = os.environ.get("DEMO_NODE", "node")
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(levelname)s %(name)s %(message)s")
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    uvicorn.run(
        "app:app",
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
