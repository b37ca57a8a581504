{{/*
The pod of a Ray node: dict root, spec (of the head or of a group), name (of the group), container. What a process may write
is on volumes; everything else is read-only.
*/}}

{{- define "arkor-ray.podTemplate" -}}
{{- $root := .root -}}
{{- $spec := .spec -}}
metadata:
  labels:
    {{- include "arkor-ray.selector" (dict "root" $root "component" "ray") | nindent 4 }}
    arkor-ray/group: {{ .name }}
    {{- /* By Ray's own label of that name its work finds the node; by this one Services and policies find the pod. */}}
    {{- with $spec.role }}
    arkor-ray/role: {{ . }}
    {{- end }}
    {{- with $spec.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $spec.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  serviceAccountName: {{ include "arkor-ray.fullname" $root }}{{ if eq .name "head" }}-head{{ end }}
  # Only the autoscaler talks to Kubernetes; it mounts a token of its own.
  automountServiceAccountToken: false
  # Services of the namespace would appear as variables, and one called arkor-ray as ARKOR_RAY_PORT.
  enableServiceLinks: false
  securityContext: {{- include "arkor-ray.podSecurityContext" $root.Values.podSecurity | nindent 4 }}
  terminationGracePeriodSeconds: {{ $spec.terminationGracePeriodSeconds }}
  {{- with $spec.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $spec.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $spec.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $spec.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $spec.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "arkor-ray.spread" . | fromYamlArray }}
  topologySpreadConstraints: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "arkor-ray.image" (dict "root" $root "tag" $spec.imageTag) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "arkor-ray.securityContext" $root | nindent 8 }}
      ports:
        {{- if eq .name "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        - {name: serve, containerPort: 8000}
      env:
        {{- /* A name may be there once. What is nearer to the pod wins. */}}
        {{- $env := dict }}
        {{- $names := list }}
        {{- range concat (include "arkor-ray.rayEnv" $root | fromYamlArray) ($root.Values.extraEnv | default list) ($spec.extraEnv | default list) }}
        {{- if not (hasKey $env .name) }}{{ $names = append $names .name }}{{ end }}
        {{- $_ := set $env .name . }}
        {{- end }}
        {{- range $names }}
        - {{ get $env . | toJson }}
        {{- end }}
      resources: {{- include "arkor-ray.resources" (dict "spec" $spec "gpuResource" $root.Values.gpuResource) | nindent 8 }}
      {{- /* Ray's agent answers for the raylet, on the head also for the GCS. A worker is ready when it can pass on
      requests to the API; one without a replica runs no proxy, is never ready, and works all the same. So it must be with roles as
      well, though no Service of ours has such pods then: KubeRay's own takes every worker that is ready. */}}
      startupProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 120
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 60
      readinessProbe:
        {{- if eq .name "head" }}
        httpGet: {path: /api/healthz, port: 52365}
        failureThreshold: 6
        {{- else }}
        httpGet: {path: /-/healthz, port: serve}
        failureThreshold: 2
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 5
      lifecycle:
        preStop:
          exec: {command: [sleep, "5"]} # until no request is sent here any more
      volumeMounts:
        {{- include "arkor-ray.tempMounts" $root | nindent 8 }}
        - {name: shared-mem, mountPath: /dev/shm}
        - {name: home, mountPath: /home/arkor}
        - {name: scratch, mountPath: /var/lib/arkor-ray}
        - {name: model-cache, mountPath: /var/cache/arkor-ray}
        - {name: catalogue, mountPath: /etc/arkor-ray, readOnly: true}
        {{- with $spec.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $spec.tmp.size }}}
    - name: ray-temp
      emptyDir: {sizeLimit: {{ $spec.rayTemp.size }}}
    - name: shared-mem
      emptyDir: {medium: Memory, sizeLimit: {{ $spec.sharedMemoryGiB }}Gi}
    - name: home
      emptyDir: {sizeLimit: {{ $spec.tmp.size }}}
    - name: scratch
      {{- include "arkor-ray.podVolume" $spec.scratch | nindent 6 }}
    - name: model-cache
      {{- if $spec.modelCache.existingClaim }}
      persistentVolumeClaim: {claimName: {{ $spec.modelCache.existingClaim }}}
      {{- else }}
      {{- include "arkor-ray.podVolume" $spec.modelCache | nindent 6 }}
      {{- end }}
    - name: catalogue
      configMap: {name: {{ include "arkor-ray.catalogueName" $root }}}
    {{- if and (eq .name "head") $root.Values.autoscaling.enabled }}
    - name: kubernetes-token
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3600}
          - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
          - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
    {{- end }}
    {{- with $spec.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{/* Of Ray and of the autoscaler, whose logs the head reads. */}}
{{- define "arkor-ray.tempMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: ray-temp, mountPath: /tmp/ray}
{{- end }}

{{/*
Of a group's constraints. Pods that may hold the API are not to be all on one machine, where that can be, unless the values say how the
group's pods stand to others. The arguments are those of arkor-ray.podTemplate.
*/}}
{{- define "arkor-ray.spread" -}}
{{- $affinity := default dict .spec.affinity -}}
{{- if .spec.topologySpreadConstraints -}}
{{ toYaml .spec.topologySpreadConstraints }}
{{- else if not (or $affinity.podAffinity $affinity.podAntiAffinity) -}}
{{- $name := .name -}}
{{- $root := .root -}}
{{- range include "arkor-ray.apiGroups" $root | fromJsonArray -}}
{{- if eq .name $name -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "arkor-ray.selector" (dict "root" $root "component" "ray") | nindent 6 }}
      arkor-ray/group: {{ $name }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A user of whom the image may know nothing needs a name as well: getpass asks for one. */}}
{{- define "arkor-ray.userEnv" -}}
- {name: HOME, value: /home/arkor}
- {name: USER, value: arkor}
- {name: LOGNAME, value: arkor}
{{- end }}

{{- define "arkor-ray.rayEnv" -}}
{{ include "arkor-ray.userEnv" . }}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Nothing to drain, as in cluster/node.sh: all state is in the database and the storage. Ray would wait half a minute of
# terminationGracePeriodSeconds for work that does not end, and Ray Train take its pod for one that is preempted.
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "0"}
- {name: HF_HOME, value: /var/cache/arkor-ray/huggingface}
{{- if .Values.hub.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with .Values.hub.existingSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- end }}
- {name: ARKOR_RAY_CLUSTER, value: "1"}
- {name: ARKOR_RAY_NODE_ROLES, value: {{ ternary "1" "0" .Values.nodeRoles | quote }}}
- {name: ARKOR_RAY_ANONYMOUS, value: {{ ternary "1" "0" .Values.anonymous | quote }}}
- {name: ARKOR_RAY_DATA_DIR, value: /var/lib/arkor-ray}
- {name: ARKOR_RAY_CACHE_DIR, value: /var/cache/arkor-ray}
- {name: ARKOR_RAY_CATALOGUE, value: /etc/arkor-ray/catalogue.yaml}
{{- if .Values.allowAnyHubModel }}
- {name: ARKOR_RAY_MODELS, value: "*"}
{{- end }}
{{ include "arkor-ray.storesEnv" . }}
{{ include "arkor-ray.storageEnv" . }}
{{- with include "arkor-ray.publicUrl" . }}
- {name: ARKOR_RAY_PUBLIC_URL, value: {{ . | quote }}}
{{- end }}
- {name: ARKOR_RAY_HOST_NAMES, value: {{ include "arkor-ray.hostNames" . | quote }}}
{{- with .Values.endpoints.domain }}
- {name: ARKOR_RAY_ENDPOINTS_DOMAIN, value: {{ . | quote }}}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: ARKOR_RAY_{{ upper $name }}
  value: {{ ternary (ternary "1" "0" (eq (toString $value) "true")) (include "arkor-ray.plainNumber" $value) (kindIs "bool" $value) | quote }}
{{- end }}
{{- end }}

{{/* The largest body that the API takes; where the values say nothing, the default of arkor_ray/settings.py. */}}
{{- define "arkor-ray.maxBodyBytes" -}}
{{ include "arkor-ray.plainNumber" (default 8388608 .Values.settings.max_body_bytes) }}
{{- end }}

{{/* Helm reads numbers as floats, which print as 8.388608e+06. */}}
{{- define "arkor-ray.plainNumber" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end }}

{{/*
What a pod is to fill of its node's disk, in whole Gi: a node has to have it, and the pod is not among the first to go when the disk
fills up, which are those that took more than they requested. /tmp and the home directory are not counted, as they are only kept
from growing without end; and there is no limit, as each volume has its own.
*/}}
{{- define "arkor-ray.nodeDisk" -}}
{{- $sizes := list .rayTemp.size -}}
{{- if not .scratch.storageClass -}}{{- $sizes = append $sizes .scratch.size -}}{{- end -}}
{{- if not (or .modelCache.storageClass .modelCache.existingClaim) -}}{{- $sizes = append $sizes .modelCache.size -}}{{- end -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- $bytes := 0.0 -}}
{{- range $sizes -}}
{{- $bytes = addf $bytes (mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .))) -}}
{{- end -}}
{{ divf $bytes 1073741824.0 | ceil | int64 }}Gi
{{- end }}

{{- define "arkor-ray.resources" -}}
{{- $resources := deepCopy .spec.resources -}}
{{- if .spec.gpus -}}
{{- $_ := set $resources "limits" (set (default dict $resources.limits) .gpuResource (int .spec.gpus)) -}}
{{- end -}}
{{- if not (or (hasKey (default dict $resources.requests) "ephemeral-storage") (hasKey (default dict $resources.limits) "ephemeral-storage")) -}}
{{- $_ := set $resources "requests" (set (default dict $resources.requests) "ephemeral-storage" (include "arkor-ray.nodeDisk" .spec)) -}}
{{- end -}}
{{ include "arkor-ray.plainResources" $resources }}
{{- end }}

{{/* Numbers as strings: Ray's custom resources take none with a fraction, and large ones would print as 8.5e+09. */}}
{{- define "arkor-ray.plainResources" -}}
{{- $plain := dict -}}
{{- range $kind, $amounts := . -}}
{{- $strings := dict -}}
{{- range $name, $amount := $amounts -}}{{- $_ := set $strings $name (include "arkor-ray.plainNumber" $amount) -}}{{- end -}}
{{- $_ := set $plain $kind $strings -}}
{{- end -}}
{{ toYaml $plain }}
{{- end }}
