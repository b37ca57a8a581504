{{/* Names, labels, images. A RayService's name must leave KubeRay room for its suffixes: 47 characters at most. */}}

{{- define "arkor-ray.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := default (ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name)) .Values.fullnameOverride -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "arkor-ray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What picks pods out. Of a Ray pod no app.kubernetes.io/name: KubeRay's own Service for the head looks for its value there. */}}
{{- define "arkor-ray.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* The pods through which clients reach the API. */}}
{{- define "arkor-ray.apiSelector" -}}
{{ include "arkor-ray.selector" (dict "root" . "component" "ray") }}
{{- if .Values.nodeRoles }}
arkor-ray/role: control-plane
{{- end }}
{{- end }}

{{/* dict root, tag (of a pod that has an image of its own, or empty) */}}
{{- define "arkor-ray.image" -}}
{{- $image := .root.Values.image -}}
{{- if and $image.digest (not .tag) -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ coalesce .tag $image.tag .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "arkor-ray.publicUrl" -}}
{{- if .Values.publicUrl -}}
{{ .Values.publicUrl | trimSuffix "/" }}
{{- else if .Values.ingress.enabled -}}
https://{{ .Values.ingress.host }}
{{- end -}}
{{- end }}

{{/* Of the API's Service, as pods of this Kubernetes cluster may call it. */}}
{{- define "arkor-ray.hostNames" -}}
{{- $name := printf "%s-api" (include "arkor-ray.fullname" .) -}}
{{- $namespaced := printf "%s.%s" $name .Release.Namespace -}}
{{ $name }},{{ $namespaced }},{{ $namespaced }}.svc,{{ $namespaced }}.svc.cluster.local
{{- end }}

{{- define "arkor-ray.catalogue" -}}
{{ dict "models" .Values.models | toYaml }}
{{- end }}

{{- define "arkor-ray.catalogueName" -}}
{{ include "arkor-ray.fullname" . }}-catalogue-{{ include "arkor-ray.catalogue" . | sha256sum | trunc 8 }}
{{- end }}

{{/* The groups that have pods, as a list of dicts: name, and the values with podDefaults under them. */}}
{{- define "arkor-ray.groups" -}}
{{- $groups := list -}}
{{- range $name, $values := .Values.workerGroups -}}
{{- $merged := mustMergeOverwrite (deepCopy $.Values.podDefaults) (deepCopy $values) -}}
{{- if gt (int $merged.maxReplicas) 0 -}}
{{- $groups = append $groups (set $merged "name" $name) -}}
{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end }}

{{/* The same of the head, and then of the groups. */}}
{{- define "arkor-ray.pods" -}}
{{- $head := mustMergeOverwrite (deepCopy .Values.podDefaults) (deepCopy .Values.head) (dict "name" "head" "role" "control-plane") -}}
{{- toJson (prepend (include "arkor-ray.groups" . | fromJsonArray) $head) -}}
{{- end }}

{{/* Of the groups those on whose pods a replica of the API may run, as a list of the same dicts. */}}
{{- define "arkor-ray.apiGroups" -}}
{{- $groups := list -}}
{{- range include "arkor-ray.groups" . | fromJsonArray -}}
{{- if or (not $.Values.nodeRoles) (eq (default "" .role) "control-plane") -}}{{- $groups = append $groups . -}}{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end }}

{{- define "arkor-ray.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .runAsUser }}
runAsGroup: {{ .runAsGroup }}
fsGroup: {{ .fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "arkor-ray.securityContext" -}}
runAsNonRoot: true
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* emptyDir, or with a storage class a volume of the pod's own. */}}
{{- define "arkor-ray.podVolume" -}}
{{- if .storageClass -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ .storageClass }}
      resources: {requests: {storage: {{ .size }}}}
{{- else -}}
emptyDir: {sizeLimit: {{ .size }}}
{{- end -}}
{{- end }}
