{{- /* Whatever more than one template asks for, and whatever takes more than a line to decide. */ -}}

{{- define "pagedserve.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "pagedserve.engineImage" -}}
{{ .Values.engineImage | default (printf "pagedserve/engine:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "pagedserve.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default "pagedserve-operator" }}
{{- end }}

{{- /* One namespace needs no right beyond it. */ -}}
{{- define "pagedserve.roleKind" -}}
{{ if .Values.watchNamespace }}Role{{ else }}ClusterRole{{ end }}
{{- end }}

{{- /* Empty where nodes aren't read, as the operator itself decides it. */ -}}
{{- define "pagedserve.readsNodes" -}}
{{- if hasKey .Values.settings "readNodes" -}}
{{ if .Values.settings.readNodes }}true{{ end }}
{{- else -}}
{{ if not .Values.watchNamespace }}true{{ end }}
{{- end }}
{{- end }}

{{- /* Empty where it isn't served: a cluster has one, so that an operator of one namespace never serves it. */ -}}
{{- define "pagedserve.servesMetricsApi" -}}
{{ if and (not .Values.watchNamespace) (ne (toString .Values.settings.metricsApi) "false") }}true{{ end }}
{{- end }}

{{- /* Operators of one namespace each may be many in a cluster; what they have of the cluster needs names of its own. */ -}}
{{- define "pagedserve.clusterSuffix" -}}
{{ if .Values.watchNamespace }}-{{ .Release.Namespace }}{{ end }}
{{- end }}

{{- /* Variables that depend on a value: settings by the names that the operator's config.py gives them. */ -}}
{{- define "pagedserve.environment" -}}
- name: ENGINE_IMAGE
  value: {{ include "pagedserve.engineImage" . | quote }}
{{- range $name, $value := .Values.settings }}
- name: {{ $name | snakecase | upper }}
  value: {{ $value | quote }}
{{- end }}
{{- if .Values.watchNamespace }}
- name: WATCH_NAMESPACE
  value: {{ .Values.watchNamespace | quote }}
{{- if not (hasKey .Values.settings "readNodes") }}
- name: READ_NODES
  value: "false"
{{- end }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Where the operator's pods go and who pulls for them. */ -}}
{{- define "pagedserve.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end }}
