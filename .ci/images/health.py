"""HEALTHCHECK's command, with the standard library alone: does the container's own process answer?

``health.py HOST PORT 8080 /health/live``: the variables that hold address and port, the port without one, the path.
"""

from __future__ import annotations

import http.client
import os
import sys

LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where to ask who listens everywhere; one of IPv6 takes no connections of IPv4."""


def main(host_variable: str, port_variable: str, default_port: str, path: str) -> int:
    """0 where the answer is 200."""
    host = os.environ.get(host_variable, "")
    port = int(os.environ.get(port_variable) or default_port)
    connection = http.client.HTTPConnection(LOOPBACK.get(host, host), port, timeout=4)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
    except OSError as error:
        print(f"{path} on port {port}: {error}")
        return 1
    print(f"{path} on port {port}: {answer.status} {answer.read(200).decode(errors='replace')}")
    return int(answer.status != 200)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
