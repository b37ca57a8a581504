{{/*
Where each secret is: in one that exists, or in one of ours. Ours are made once: an upgrade finds the value in the cluster.
*/}}

{{- define "arkor-ray.rayAuthSecret" -}}
{{ default (printf "%s-ray-auth" (include "arkor-ray.fullname" .)) .Values.rayAuth.existingSecret }}
{{- end }}

{{- define "arkor-ray.databaseSecret" -}}
{{- if .Values.postgresql.enabled -}}
name: {{ include "arkor-ray.fullname" . }}-postgresql
key: url
{{- else -}}
{{ toYaml .Values.database.existingSecret }}
{{- end -}}
{{- end }}

{{/* What the settings of a cluster need to be accepted. */}}
{{- define "arkor-ray.storesEnv" -}}
- name: ARKOR_RAY_DATABASE_URL
  valueFrom:
    secretKeyRef: {{- include "arkor-ray.databaseSecret" . | nindent 6 }}
- {name: ARKOR_RAY_STORAGE_URL, value: {{ include "arkor-ray.storageUrl" . | quote }}}
{{- with include "arkor-ray.storageEndpoint" . }}
- {name: ARKOR_RAY_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "arkor-ray.storageUrl" -}}
{{ ternary (printf "s3://%s" .Values.objectStore.bucket) .Values.storage.url .Values.objectStore.enabled }}
{{- end }}

{{- define "arkor-ray.storageEndpoint" -}}
{{ ternary (printf "http://%s-object-store:7070" (include "arkor-ray.fullname" .)) .Values.storage.endpointUrl .Values.objectStore.enabled }}
{{- end }}

{{- define "arkor-ray.storageEnv" -}}
- name: AWS_DEFAULT_REGION
  value: {{ .Values.storage.region | quote }}
{{- $secret := .Values.storage.existingSecret }}
{{- if .Values.objectStore.enabled }}
{{- $secret = dict "name" (printf "%s-object-store" (include "arkor-ray.fullname" .)) "accessKeyIdKey" "accessKeyId" "secretAccessKeyKey" "secretAccessKey" }}
{{- end }}
{{- if $secret.name }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ $secret.name }}, key: {{ $secret.accessKeyIdKey }}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: {{ $secret.name }}, key: {{ $secret.secretAccessKeyKey }}}
{{- end }}
{{- end }}

{{/* dict root, name, key (of the Secret), value (what the values say) */}}
{{- define "arkor-ray.secretValue" -}}
{{- if .value -}}
{{- .value -}}
{{- else -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name | default dict -}}
{{- $kept := get ($found.data | default dict) .key -}}
{{- if $kept -}}{{- $kept | b64dec -}}{{- else -}}{{- randAlphaNum 40 -}}{{- end -}}
{{- end -}}
{{- end }}
