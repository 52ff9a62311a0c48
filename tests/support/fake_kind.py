"""Programs named kind and docker that write down what they are asked, for tests where no daemon runs.

A fake cluster is a line in a file; ``create`` copies a kubeconfig where one is given. What a command does beyond that
is ``told``: a shell snippet of its own, run first.
"""

from __future__ import annotations

from pathlib import Path

_PROGRAM = """#!/bin/sh
cd {folder}
printf '%s\\n' "{name} $*" >> calls
[ ! -e "{name}-$1" ] || . "./{name}-$1"
"""
_KIND = """
case "$1 $2" in
"create cluster")
    cat > /dev/null
    echo "$4" >> clusters
    for word in "$@"; do last="$word"; done
    [ ! -e admin.kubeconfig ] || cp admin.kubeconfig "$last";;
"delete cluster")
    grep -vxF "$4" clusters > left
    mv left clusters;;
"get clusters")
    cat clusters;;
esac
"""


class FakeKind:
    """``folder`` goes to the front of the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "clusters").touch()
        (folder / "calls").touch()
        for name, rest in {"kind": _KIND, "docker": ""}.items():
            program = folder / name
            program.write_text(_PROGRAM.format(folder=folder, name=name) + rest)
            program.chmod(0o755)

    def tell(self, program: str, command: str, snippet: str) -> None:
        """What ``program command …`` does first; ``exit`` in it leaves out the rest."""
        (self.folder / f"{program}-{command}").write_text(snippet)

    @property
    def calls(self) -> list[str]:
        """The command lines so far."""
        return (self.folder / "calls").read_text().splitlines()

    @property
    def clusters(self) -> list[str]:
        """The clusters that are there."""
        return (self.folder / "clusters").read_text().split()

    def add(self, cluster: str) -> None:
        """One that somebody else made."""
        (self.folder / "clusters").write_text("\n".join([*self.clusters, cluster, ""]))
