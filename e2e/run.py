"""`make e2e`: the scenarios on the cluster that E2E_PROVIDER names; where kind can't run, what can be checked of it.

The dry run collects every scenario and renders all that kind and docker would be told, so that neither rots unseen.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import yaml
from e2e.controlplane.build import BuildFailed, build
from e2e.providers.choice import chosen
from e2e.providers.kind import why_no_daemon
from e2e.providers.kind_plan import BadVariable, KindPlan, Step
from e2e.providers.provider import Unavailable

ROOT = Path(__file__).parents[1]


def main() -> int:
    """The exit status; arguments go to pytest."""
    try:
        name = chosen()
        if name == "kind" and (reason := why_dry()):
            print(f"E2E_PROVIDER=kind: {reason}; dry run: collecting the scenarios and rendering the plan", flush=True)
            return _collect() or _show_plan(KindPlan.read())
        if name == "local":
            build()
    except (Unavailable, BadVariable, BuildFailed) as error:
        print(f"make e2e: {error}", file=sys.stderr)
        return 2
    # In place of this process: one that waited would kill it soon after Ctrl-C, in the middle of its cleaning up.
    os.chdir(ROOT)
    # Whoever names a cluster wants to hear that it can't be had, and not that everything was skipped.
    os.environ["CI"] = os.environ.get("CI") or "1"
    command = _pytest("-s", *sys.argv[1:])
    os.execv(command[0], command)


def why_dry(environment: Mapping[str, str] = os.environ) -> str:
    """One line on why nothing is run on kind; empty where it is. ``DRY_RUN`` asks for that where a daemon runs, too."""
    return "DRY_RUN asks for it" if environment.get("DRY_RUN", "") not in ("", "0") else why_no_daemon()


def steps(plan: KindPlan) -> Iterator[Step]:
    """Everything that the provider would run, in the order of a run."""
    yield from (*plan.needs(), *plan.up(Path("kubeconfig")))
    yield from (plan.build(plan.images.light_engine), plan.load([plan.images.light_engine]))
    yield plan.kill_pod(f"{plan.cluster}-worker", "pagedserve-system", "pagedserve-operator-0")
    yield plan.kill_apiserver()
    yield plan.lose(f"{plan.cluster}-worker3")
    second = replace(plan, cluster=f"{plan.cluster}-2", reachable=False, small=True)
    yield from second.up(Path("second"))
    yield second.build(plan.images.first_operator)
    yield second.load([plan.images.first_operator])
    yield from (second.down(), plan.down())


def _show_plan(plan: KindPlan) -> int:
    for step in steps(plan):
        print(f"# {step.why}\n{shlex.join(step.command)}")
    nodes = yaml.safe_load(plan.config())["nodes"]
    print(f"The plan renders: a cluster of {len(nodes)} nodes")
    return 0


def _collect() -> int:
    return subprocess.run(_pytest("--collect-only", "-q"), cwd=ROOT).returncode


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments, "e2e"]


if __name__ == "__main__":
    sys.exit(main())
