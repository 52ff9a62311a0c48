"""The chart's templates: the manifests that kustomize gathers, with what a value decides put into their place.

An object is written once, in manifests/ or crds/. Every edit must find its place, and every folder must be known, so
that a manifest that changes either takes its edits along or stops `make chart`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from bundle import OVERLAY, ROOT, files

CHART = ROOT / "manifests" / "helm" / "pagedserve"
MONITORING = ROOT / "manifests" / "components" / "monitoring"

OF_THE_CLUSTER = "(not .Values.watchNamespace)"
FOLDERS: dict[str, str] = {
    "crds": OF_THE_CLUSTER,
    "manifests/base": "",
    "manifests/rbac": "",
    "manifests/overlays/cluster-wide": OF_THE_CLUSTER,
    "manifests/components/metrics-api": '(include "pagedserve.servesMetricsApi" .)',
    "manifests/components/nodes": '(include "pagedserve.readsNodes" .)',
    "manifests/components/monitoring": ".Values.monitoring.enabled",
}
"""When the objects of a folder belong to the release."""

KINDS: dict[str, str] = {
    "CustomResourceDefinition": ".Values.crds.install",
    "ServiceAccount": ".Values.serviceAccount.create",
    **dict.fromkeys(("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"), ".Values.rbac.create"),
}
"""When objects of a kind belong to the release, besides."""

# Helm keeps what it knows of a release in the release's namespace, which must be there before: see --create-namespace.
LEFT_OUT = frozenset({"Namespace"})

Edit = tuple[str, str]
"""What is found (a pattern, ^ and $ being those of a line), and what the template says in its place."""


def _port(name: str, setting: str) -> Edit:
    """That of a container's port: where the setting is given, the operator listens there."""
    return (
        rf"(?<=- name: {name}\n              containerPort: )\d+$",
        rf"{{{{ .Values.settings.{setting} | default \g<0> }}}}",
    )


ROLE_KIND = '{{ include "pagedserve.roleKind" . }}'
ACCOUNT = '{{ include "pagedserve.serviceAccountName" . }}'
IN_WATCHED = """\
metadata:
  name: pagedserve-operator
  {{- with .Values.watchNamespace }}
  namespace: {{ . }}
  {{- end }}
"""
NODES_NAME = (r"^  name: pagedserve-operator-nodes$", r'\g<0>{{ include "pagedserve.clusterSuffix" . }}')
MONITORING_LABELS = """\
    {{- with .Values.monitoring.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
"""
POD_METADATA = """\
        {{- with .Values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
"""
PLACEMENT = """\
      {{- with include "pagedserve.placement" . }}
      {{- . | trim | nindent 6 }}
      {{- end }}
      containers:
"""
PULL_POLICY = """\
          image: {{ include "pagedserve.image" . | quote }}
          {{- with .Values.image.pullPolicy }}
          imagePullPolicy: {{ . }}
          {{- end }}
"""
ACCOUNT_METADATA = f"""\
  name: {ACCOUNT}
  {{{{- with .Values.serviceAccount.annotations }}}}
  annotations:
    {{{{- toYaml . | nindent 4 }}}}
  {{{{- end }}}}
"""

EVERYWHERE: list[Edit] = [
    (r"(?<=namespace: )pagedserve-system$", "{{ .Release.Namespace }}"),
    (r"(?<=  - kind: ServiceAccount\n    name: )pagedserve-operator$", ACCOUNT),
]
"""Edits of all objects, where they apply."""

LITERAL = r"^            - name: ([A-Z_]+)\n              value: (.*)\n"
"""A variable of the operator with its value; those that come from elsewhere stay as they are."""

EDITS: dict[tuple[str, str], list[Edit]] = {
    ("CustomResourceDefinition", "inferenceservices.pagedserve.dev"): [
        # In the chart's crds/ no upgrade would touch it; not kept, its end would be that of all resources.
        (r"^metadata:\n", r"\g<0>  annotations:\n    helm.sh/resource-policy: keep\n"),
    ],
    ("ServiceAccount", "pagedserve-operator"): [(r"^  name: pagedserve-operator\n", ACCOUNT_METADATA)],
    ("ClusterRole", "pagedserve-operator"): [
        (r"^kind: ClusterRole$", f"kind: {ROLE_KIND}"),
        (r"^metadata:\n  name: pagedserve-operator\n", IN_WATCHED),
    ],
    ("ClusterRoleBinding", "pagedserve-operator"): [
        (r"^kind: ClusterRoleBinding$", f"kind: {ROLE_KIND}Binding"),
        (r"^  kind: ClusterRole$", f"  kind: {ROLE_KIND}"),
        (r"^metadata:\n  name: pagedserve-operator\n", IN_WATCHED),
    ],
    ("ClusterRole", "pagedserve-operator-nodes"): [NODES_NAME],
    ("ClusterRoleBinding", "pagedserve-operator-nodes"): [NODES_NAME],
    ("PodMonitor", "pagedserve-operator"): [(r"^spec:\n", MONITORING_LABELS)],
    ("PrometheusRule", "pagedserve-operator"): [(r"^spec:\n", MONITORING_LABELS)],
    ("Deployment", "pagedserve-operator"): [
        (r"^  replicas: \d+$", "  replicas: {{ .Values.replicas }}"),
        (r"^    spec:\n", POD_METADATA),
        (r"(?<=^      serviceAccountName: ).*$", ACCOUNT),
        (r"^      containers:\n", PLACEMENT),
        (r"^          image: .*\n", PULL_POLICY),
        (LITERAL, ""),
        (r"^          ports:\n", r'            {{- include "pagedserve.environment" . | nindent 12 }}\n\g<0>'),
        _port("metrics", "metricsPort"),
        _port("metrics-api", "metricsApiPort"),
        (
            r"^          resources:\n(?:            .*\n)+",
            "          resources:\n            {{- toYaml .Values.resources | nindent 12 }}\n",
        ),
    ],
}
"""Edits of one object by its kind and name; each must find its place."""


class Unplaced(Exception):
    """A manifest that the chart has no place for, or an edit that finds no place; the message says what to do."""


def templates() -> dict[str, str]:
    """The text of each template that is made, by file name; raises Unplaced."""
    made: dict[str, str] = {}
    for source in [*files(OVERLAY), *files(MONITORING)]:
        if text := _template(source):
            name = template_name(source)
            if name in made:
                raise Unplaced(f"two manifests would be templates/{name}: rename {source.relative_to(ROOT)}")
            made[name] = text
    return made


def template_name(source: Path) -> str:
    """That of the manifest, after its component's where it is of one."""
    component = f"{source.parent.name}-" if source.parent.parent.name == "components" else ""
    return f"{component}{source.name}"


def _template(source: Path) -> str:
    place = source.relative_to(ROOT)
    if str(place.parent) not in FOLDERS:
        raise Unplaced(f"helm_templates.FOLDERS doesn't say when the chart takes in {place.parent}")
    documents = re.split(r"^---\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = [part for document in documents for part in _document(document, FOLDERS[str(place.parent)])]
    head = f"{{{{- /* Made by `make chart` from {place}; change that instead. */ -}}}}\n"
    return head + "".join(parts) if parts else ""


def _document(text: str, condition: str) -> Iterator[str]:
    """The part of a template that one object is; none for one that is left out."""
    manifest = yaml.safe_load(text)
    if manifest is None or manifest["kind"] in LEFT_OUT:
        return
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    conditions = [each for each in (condition, KINDS.get(kind, "")) if each]
    edited = _edit(text.replace("{{", '{{ "{{" }}'), kind, name)
    if not conditions:
        yield f"---\n{edited}"
        return
    both = f"and {' '.join(conditions)}" if len(conditions) > 1 else conditions[0]
    yield f"{{{{- if {both} }}}}\n---\n{edited}{{{{- end }}}}\n"


def _edit(text: str, kind: str, name: str) -> str:
    for pattern, put in EVERYWHERE:
        text = re.sub(pattern, put, text, flags=re.MULTILINE)
    for pattern, put in EDITS.get((kind, name), []):
        text, places = re.subn(pattern, put, text, flags=re.MULTILINE)
        if not places:
            raise Unplaced(f"{kind} {name} has no place for the edit {pattern!r}: change helm_templates.EDITS with it")
    return text


def variables() -> dict[str, str]:
    """The literal variables of the operator's container, by name, as the manifest writes them."""
    text = (ROOT / "manifests" / "base" / "deployment.yaml").read_text(encoding="utf-8")
    return dict(re.findall(LITERAL, text, flags=re.MULTILINE))
