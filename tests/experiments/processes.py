"""Stands in for the suite's worker; apart from the tests, because each process that it runs in imports this file."""

import os


def serve(connection, setting):
    while True:
        try:
            _, name, _ = connection.recv()
        except EOFError:
            return
        if name == "exits":
            os._exit(3)
        while name == "hangs":
            pass
        connection.send(({"status": "failed"}, True) if name == "breaks" else ({"status": "ok"}, False))
