"""The process that runs the cases, and its handle. It is replaced when a case hangs or breaks the device."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from experiments.gpu_suite.case import Case, Record, Setting, sentence


def serve(connection: Connection, setting: Setting) -> None:
    """Run the cases that are asked for until the other end hangs up or the device is broken."""
    from experiments.gpu_suite.sections import SECTIONS

    torch.manual_seed(0)
    gc.freeze()  # what has been imported is no garbage, and looking through it takes longer than short cases
    cases: dict[str, dict[str, Case]] = {}
    while True:
        try:
            section, name, seconds = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        reply: Record
        try:
            if section not in cases:
                cases[section] = {case.name: case for case in SECTIONS[section].cases(setting)}
            reply = {"status": "ok", **cases[section][name].run(seconds)}
        except Exception as error:
            reply = {"status": "failed", "error": sentence(error)}
        broken = False
        gc.collect()
        if setting.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:  # such as an illegal address: every later call would fail with it
                broken = True
                reply = {"error": sentence(error), **reply, "status": "failed"}
        connection.send((reply, broken))
        if broken:
            connection.close()
            os._exit(1)  # a broken device makes libraries wait or abort while they are unloaded


class Worker:
    """Runs one case at a time in a process of its own, which starts with the first case."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, section: str, case: str, seconds: float, limit: float) -> Record:
        """The record of a case.

        Args:
            section: its section.
            case: its name.
            seconds: what the case is told that it may take.
            limit: after so many seconds the process is ended.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=serve, args=(other, self._setting))
            self._process.start()
            other.close()  # so that the end of the process is the end of the connection
        assert self._connection is not None
        start = time.monotonic()
        try:
            self._connection.send((section, case, seconds))
            if not self._connection.poll(limit):
                self.stop(kill=True)
                return {"status": "failed", "error": f"did not end within {limit:.0f} s; its process was ended"}
            reply, broken = self._connection.recv()
        except (EOFError, OSError):
            process = self._process
            self.stop(kill=False)
            took = time.monotonic() - start
            return {"status": "failed", "error": f"its process ended by code {process.exitcode} after {took:.0f} s"}
        if broken:
            self.stop(kill=True)
        return reply

    def stop(self, *, kill: bool) -> None:
        """End the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if kill:
                self._process.kill()
            self._process.join(8)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join(20)
        self._process = self._connection = None
