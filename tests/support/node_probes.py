"""The probes of a container, asked when they are due."""

from __future__ import annotations

import http.client
import socket
from dataclasses import dataclass

from node_spec import Probe


@dataclass
class Watch:
    """The state of one probe: ``passing`` is None until it has been answered often enough."""

    probe: Probe
    due: float
    passing: bool | None = None
    run: int = 0

    def ask(self, address: str, moment: float) -> None:
        """Probe if it is time."""
        if moment < self.due:
            return
        self.due = moment + self.probe.period
        answer = answers(self.probe, address)
        # A run of equal answers: above zero successes, below zero failures.
        self.run = max(self.run, 0) + 1 if answer else min(self.run, 0) - 1
        if self.run >= self.probe.successes:
            self.passing = True
        elif -self.run >= self.probe.failures:
            self.passing = False


def answers(probe: Probe, address: str) -> bool:
    """Whether the address answers with a status below 400, or accepts a connection, in time."""
    try:
        if probe.path is None:
            socket.create_connection((address, probe.port), probe.timeout).close()
            return True
        connection = http.client.HTTPConnection(address, probe.port, timeout=probe.timeout)
        try:
            connection.request("GET", probe.path)
            return 200 <= connection.getresponse().status < 400
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False
